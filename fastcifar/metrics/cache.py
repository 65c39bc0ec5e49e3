"""Where statistics of real images and the weights of metric networks are kept."""

from __future__ import annotations

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """$FASTCIFAR_CACHE, or ~/.cache/fastcifar; it may not exist yet."""
    return pathlib.Path(os.environ.get("FASTCIFAR_CACHE") or pathlib.Path.home() / ".cache" / "fastcifar")
