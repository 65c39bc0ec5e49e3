"""Features of the FID's Inception network: pytorch-fid's network, with weights that are looked for here."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch

from fastcifar.data.dataset import DataError
from fastcifar.data.download import cache_folder, download
from fastcifar.data.tensors import read_tensors

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SIZE_LIMIT = 100 * 10**6
# Images at 299 × 299 that go through the network at once; as pytorch-fid does.
_BATCH = 50


class InceptionFeatures:
    """pool3 of the Inception network that the FID is defined with, [N, 2048].

    Images are brought to 299 × 299 by the network itself, bilinearly, as pytorch-fid does.

    Args:
        weights: a file with pytorch-fid's weights, .pth or .safetensors. Default: the published file in the cache
            folder ($FASTCIFAR_CACHE, else ~/.cache/fastcifar) or torch hub's, else downloaded to the former.
        device: of the network.
        notify: told of a download.

    Attributes:
        dimension: 2048. device: of network and features. resize: what the network does to the images' size.
        name: "inception", and "(not the published file)" where the weights are another.
        digest: SHA-256 of the weights' file.

    Raises:
        DataError: no weights, or other tensors than the network's.
        ValueError: pytorch-fid or torchvision cannot be imported.

    Source: Heusel et al., GANs trained by a two time-scale update rule, 2017; github.com/mseitzer/pytorch-fid.
    """

    dimension = 2048
    resize = "bilinear to 299×299, in the network"
    settings = ""

    def __init__(
        self, weights: str | None = None, device: torch.device | str = "cpu", *, notify: Callable[[str], None] = print
    ):
        module = _import_network()
        path = _find(weights, notify)
        content = path.read_bytes()
        self.device, self.digest = torch.device(device), hashlib.sha256(content).hexdigest()
        self.name = "inception" if self.digest == SHA256 else "inception (not the published file)"
        self.network = _build(module, read_tensors(content, str(path)), path).to(self.device)

    @torch.no_grad()
    def __call__(self, images: numpy.ndarray) -> torch.Tensor:
        """Features [N, 2048], float32, of images uint8 [N, H, W, 3]."""
        pixels = torch.from_numpy(numpy.ascontiguousarray(images)).permute(0, 3, 1, 2)
        parts = [self.network(part.to(self.device).float() / 255)[0].flatten(1) for part in pixels.split(_BATCH)]
        return torch.cat(parts)


def _import_network() -> Any:
    try:
        from pytorch_fid import inception
    except (ImportError, RuntimeError, OSError) as error:  # torchvision raises RuntimeError beside another torch
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            "the inception features need pytorch-fid and torchvision; run `pip install 'fastcifar[metrics]'` "
            f"({reason})"
        ) from error
    return inception


def _find(given: str | None, notify: Callable[[str], None]) -> pathlib.Path:
    if given is not None:
        if not pathlib.Path(given).is_file():
            raise DataError(f"there is no file {given}; give {FILE} from {URL}")
        return pathlib.Path(given)
    hub = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / FILE
    target = cache_folder() / FILE
    if hub.is_file() and not target.is_file():
        return hub
    try:
        return download(URL, target, sha256=SHA256, size_limit=_SIZE_LIMIT, notify=notify)
    except (DataError, OSError) as error:
        raise DataError(f"the inception features need {FILE}; {error}, or give its path") from error


def _build(module: Any, tensors: Mapping[str, torch.Tensor], path: pathlib.Path) -> torch.nn.Module:
    """pytorch-fid's network with these tensors in place of those that it would download."""
    fetch = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *args, **options: tensors
    try:
        return module.InceptionV3([module.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} does not hold the weights of pytorch-fid's network ({reason})") from error
    finally:
        module.load_state_dict_from_url = fetch
