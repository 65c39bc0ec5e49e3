"""Runs a function in several gloo processes and returns what each of them returned.

The processes are forked from a server that has imported torch and the package once for the whole test session.
"""

from __future__ import annotations

import multiprocessing
import socket
import traceback

import torch
import torch.distributed as dist


def _entry(function, rank, world_size, port, results, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        results.put((rank, None, function(rank, world_size, *arguments)))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except Exception:
        results.put((rank, traceback.format_exc(), None))


def run_ranks(function, world_size: int, *arguments, timeout: float = 120.0) -> list:
    """`function(rank, world_size, *arguments)` in each process; its result must be picklable (NumPy, not tensors)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # The first optimiser imports torch._dynamo, which takes seconds.
    context.set_forkserver_preload(["torch._dynamo", "fastcifar.train"])
    results = context.Queue()
    processes = [
        context.Process(target=_entry, args=(function, rank, world_size, port, results, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        collected = {}
        for _ in processes:
            rank, error, value = results.get(timeout=timeout)
            assert error is None, f"rank {rank} failed:\n{error}"
            collected[rank] = value
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return [collected[rank] for rank in range(world_size)]
