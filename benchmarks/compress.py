"""`python -m benchmarks.compress --checkpoint RUN`: the methods of `fastcifar.compress` side by side, stored.

Runs the command once for each method (channels 50 %, unstructured 70 %, int8), times all networks in turns (ONNX
Runtime, one thread) and stores one table in results/compress-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import reporting
from fastcifar import compress
from fastcifar.deploy import measuring, programs

AMOUNTS = {"channels": 0.5, "unstructured": 0.7, "int8": None}


def measure(checkpoint: str, fine_tune: int, folder: pathlib.Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each network; `times original` is how many times faster than the original it is."""
    found: dict[str, dict[str, Any]] = {}
    files: dict[str, pathlib.Path] = {}
    for method, amount in AMOUNTS.items():
        arguments = ["--checkpoint", checkpoint, "--method", method, "--output", str(folder / method)]
        if amount is not None:
            arguments += ["--amount", str(amount), "--fine-tune", str(fine_tune)]
        compress.main(arguments)
        rows = json.loads((folder / method / "compress.json").read_text())["rows"]
        names = ("original", "int8") if amount is None else ("original", "pruned", "tuned")
        found |= {row["network"]: row for row in rows}
        files |= {row["network"]: folder / method / f"{name}.onnx" for row, name in zip(rows, names, strict=False)}
    images = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spent = measuring.times({name: programs.read(path, "onnx", 1) for name, path in files.items()}, images, rounds)
    return [
        {
            "network": name,
            "parameters": row["parameters"],
            "not zero": row["nonzero"],
            "bytes": row["bytes"],
            "compressed": row["compressed"],
            "accuracy, %": row["accuracy"],
            "ms for 100 images": round(spent[name], 2),
            "times original": round(spent["original"] / spent[name], 2),
        }
        for name, row in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and stores; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compress", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="run of a ds_resnet")
    parser.add_argument("--fine-tune", type=int, default=300, help="steps after pruning; default: 300")
    parser.add_argument("--rounds", type=int, default=41, help="of the timings; default: 41")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(parsed.checkpoint, parsed.fine_tune, pathlib.Path(folder), parsed.rounds)
    print(reporting.table(rows))
    print(reporting.save("compress-cpu", {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
