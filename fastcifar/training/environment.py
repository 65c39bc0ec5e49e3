"""The device, the number format and the process settings of a run, and what of them is worth recording."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from typing import Any

import torch

import fastcifar
from fastcifar import dispatch, native

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; "auto" is this process's GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name!r} is not known; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch {torch.__version__} sees no GPU; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
        torch.cuda.set_device(device)
    return device


def choose_amp_dtype(name: str, device: torch.device) -> str:
    """ "bf16", "fp16" or "fp32"; "auto" is bf16 where the processor or GPU computes in it, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(_processor_flags()) else "fp32"


def _processor_flags() -> list[str]:
    try:
        found = re.search(r"^flags\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []
    return found.group(1).split() if found else []


def processor_name() -> str:
    """The processor as its maker calls it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def prepare_process(device: torch.device, *, deterministic: bool) -> dict[str, Any]:
    """Settings that make training fast (or repeatable) on this device; returns what was set."""
    settings: dict[str, Any] = {"deterministic": deterministic}
    if device.type == "cpu":
        settings["allocator_keeps_memory"] = native.tune_allocator()
        settings["threads"] = torch.get_num_threads()
    else:
        torch.backends.cudnn.benchmark = not deterministic
        settings["cudnn_benchmark"] = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return settings


def memory_mib(device: torch.device) -> int:
    """The most memory that this process has held: on its GPU, or in all."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def describe(device: torch.device, settings: dict[str, Any], program: str = "fastcifar.train") -> dict[str, Any]:
    """Versions, hardware, settings, choices and the command of a program, as `env.json` holds them."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "fastcifar": fastcifar.__version__}
    for package in ("triton", "numpy", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    hardware: dict[str, Any] = {"processor": processor_name(), "cpus": os.cpu_count(), "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return {
        "versions": versions,
        "hardware": hardware,
        "settings": settings,
        "native_module": native.why_not() or native.build_info(),
        "implementations": dispatch.explain().splitlines(),
        "command": ["python", "-m", program, *sys.argv[1:]],
    }
