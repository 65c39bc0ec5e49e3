"""Images that no process holds all of: each keeps a part, and a batch's images travel to where they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
import torch.distributed as dist

PLACEMENTS = ("replicated", "sharded")


class ImageShard:
    """This process's contiguous part of the images, on its device.

    Args:
        images: uint8 [N, H, W, 3], the same in all processes; process r keeps those from r·⌈N/n⌉ on.
        rank, world_size: this process, and n.
        device: where the part lies and the batches are made.

    Raises:
        ValueError: torch.distributed has not begun, or has another number of processes.
    """

    def __init__(self, images: numpy.ndarray, rank: int, world_size: int, device: torch.device):
        if not dist.is_initialized() or dist.get_world_size() != world_size:
            raise ValueError(
                f"ImageShard: sharing images out over {world_size} processes needs torch.distributed with as many; "
                "start them with torchrun"
            )
        self.rank, self.size = rank, -(-len(images) // world_size)
        own = images[rank * self.size : (rank + 1) * self.size]
        self._own = torch.from_numpy(numpy.ascontiguousarray(own)).to(device)

    def fetch(self, wanted: Sequence[numpy.ndarray]) -> torch.Tensor:
        """One all-to-all of bytes; all processes call it together.

        Args:
            wanted: for each process the indices of the images that it needs, int64 [k]; the same in all processes.

        Returns:
            Those that this process needs, uint8 [k, H, W, 3], in that order.
        """
        given = [indices[indices // self.size == self.rank] - self.rank * self.size for indices in wanted]
        owners = wanted[self.rank] // self.size
        outgoing = self._own[torch.from_numpy(numpy.concatenate(given)).to(self._own.device)]
        incoming = outgoing.new_empty((len(owners), *outgoing.shape[1:]))
        counts = numpy.bincount(owners, minlength=len(wanted)).tolist()
        dist.all_to_all_single(incoming, outgoing, counts, [len(indices) for indices in given])
        # They come by owner; a stable sort by owner is the order that they come in.
        places = torch.from_numpy(numpy.argsort(owners, kind="stable")).to(incoming.device)
        return torch.empty_like(incoming).index_copy_(0, places, incoming)
