"""`python -m benchmarks.compress --checkpoint RUN`: the methods of `fastcifar.compress` side by side, stored.

Runs the command once for each method (channels 50 %, unstructured 70 %, int8) and stores one table in
results/compress-cpu.json; times are of ONNX Runtime on one thread, each pair in turns.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import reporting
from fastcifar import compress

AMOUNTS = {"channels": 0.5, "unstructured": 0.7, "int8": None}


def measure(checkpoint: str, fine_tune: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """A row for each network; `times original` is how many times faster than the original beside it."""
    rows: list[dict[str, Any]] = []
    for method, amount in AMOUNTS.items():
        arguments = ["--checkpoint", checkpoint, "--method", method, "--output", str(folder / method)]
        if amount is not None:
            arguments += ["--amount", str(amount), "--fine-tune", str(fine_tune)]
        compress.main(arguments)
        original, *others = json.loads((folder / method / "compress.json").read_text())["rows"]
        rows += [
            {
                "network": row["network"],
                "parameters": row["parameters"],
                "not zero": row["nonzero"],
                "bytes": row["bytes"],
                "compressed": row["compressed"],
                "accuracy, %": row["accuracy"],
                "ms for 100 images": row["ms"],
                "times original": round(original["ms"] / row["ms"], 2),
            }
            for row in (others if rows else [original, *others])
        ]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and stores; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compress", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="run of a ds_resnet")
    parser.add_argument("--fine-tune", type=int, default=300, help="steps after pruning; default: 300")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(parsed.checkpoint, parsed.fine_tune, pathlib.Path(folder))
    print(reporting.table(rows))
    print(reporting.save("compress-cpu", {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
