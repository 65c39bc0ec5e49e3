"""`python -m benchmarks.report`: tables and pictures of the stored results; `--check` only compares the tables.

A document says where a table stands with `<!-- table NAME -->` and `<!-- end -->`; what stands between them is
replaced. Pictures go to docs/images/: roofline-KIND.png and bars-KIND.png, KIND is cpu or gpu.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

from benchmarks import device_tables, reporting, scaling_tables, tables

ROOT = reporting.RESULTS.parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
IMAGES = ROOT / "docs" / "images"
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {**tables.TABLES, **device_tables.TABLES, **scaling_tables.TABLES}


def filled(document: str) -> str:
    """The document with its tables written anew."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], document)


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the pictures of every device that was measured; their paths."""
    from benchmarks import pictures

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    measured = {kind: content for kind, (_, content) in device_tables.files().items() if "operators" in content}
    for kind, content in measured.items():
        for name, picture in (("roofline", pictures.roofline), ("bars", pictures.bars)):
            made.append(folder / f"{name}-{kind}.png")
            picture(content, made[-1])
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, or with --check names the documents that differ; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a document differs")
    check = parser.parse_args(arguments).check
    stale = [path for path in DOCUMENTS if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs from the stored results' if check else 'written'}")
        if not check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in [] if check else draw(IMAGES):
        print(f"{path.relative_to(ROOT)}: drawn")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
