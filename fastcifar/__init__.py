"""Fused operators, drop-in modules and CIFAR training for PyTorch. Importing it compiles nothing, touches no GPU."""

from __future__ import annotations

import importlib
import importlib.util as _util
import pathlib as _pathlib
from importlib import metadata as _metadata

_TREE = _pathlib.Path(__file__).resolve().parent.parent
if _util.find_spec("fastcifar.kernels") is None and (_TREE / "kernels" / "__init__.py").is_file():
    # A bare source tree: there the folder kernels/ beside this one is the subpackage fastcifar.kernels.
    __path__.append(str(_TREE))

try:
    __version__ = _metadata.version("fastcifar")
except _metadata.PackageNotFoundError:
    __version__ = "0.1.0"

_SUBMODULES = ("data", "dispatch", "functional", "fuse", "models", "native", "nn", "profiling", "reference", "training")

_FUNCTIONS = {"unfuse": "fuse", "fold_batch_norm": "folding"}

__all__ = ["__version__", *_SUBMODULES, *_FUNCTIONS]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"fastcifar.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"fastcifar.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
