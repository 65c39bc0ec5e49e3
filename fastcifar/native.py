"""The compiled module: whether it is there, why not, and what it was built with."""

from __future__ import annotations

import functools
import importlib
import pathlib
import sys
from types import ModuleType
from typing import Any


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fastcifar.kernels._native"), None
    except ModuleNotFoundError as error:
        if error.name != "fastcifar.kernels._native":
            raise
        return None, _missing()
    except ImportError as error:
        return None, f"the compiled module does not load ({error}); reinstall fastcifar on this machine"


def _missing() -> str:
    import fastcifar

    here = pathlib.Path(fastcifar.__file__).resolve().parent
    if (here / "kernels").is_dir():
        return (
            "fastcifar was installed without its compiled module (no C++17 compiler was found, or "
            "FASTCIFAR_PURE_PYTHON was set); install a compiler and run `pip install --force-reinstall fastcifar`"
        )
    tree = here.parent
    message = f"this is the source tree {tree}, whose compiled module is not built; run `pip install -e {tree}`"
    for entry in sys.path:
        installed = pathlib.Path(entry or ".").resolve() / "fastcifar"
        if installed != here and (installed / "kernels").is_dir():
            return f"{message}, or leave that folder to use the copy installed at {installed}"
    return message


def module() -> ModuleType | None:
    """The compiled module, or None."""
    return _load()[0]


def why_not() -> str | None:
    """None when the compiled module is there; otherwise one sentence: why not, and what to do."""
    return _load()[1]


def build_info() -> dict[str, Any]:
    """Compiler, CUDA and OpenMP of the compiled module; empty without it."""
    return dict(module().build_info()) if module() else {}


def has_cuda() -> bool:
    """Whether the compiled module holds CUDA code."""
    return bool(build_info().get("cuda"))


@functools.cache
def cuda_obstacle() -> str | None:
    """None when the module's CUDA code can run on this machine; otherwise one sentence: why not."""
    if module() is None:
        return why_not()
    if not has_cuda():
        return "the compiled module was built without CUDA (no working nvcc was found); install one and reinstall"
    reason = module().cuda_obstacle()
    return None if reason is None else f"the compiled module finds no CUDA device: {reason}"


def tune_allocator() -> bool:
    """Makes the C library keep freed memory (glibc: mmap and trim thresholds at their maximum).

    Large tensors then reuse pages instead of having them mapped and zeroed again in each training step. Acts on the
    whole process; returns whether it took effect (False without the compiled module or without glibc).
    """
    return bool(module().tune_allocator()) if module() else False
