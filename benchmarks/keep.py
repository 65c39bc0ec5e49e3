"""`python -m benchmarks.keep FOLDER [NAME]`: stores the result of a training run or of a search.

Merges result.json, env.json and config.yaml of the folder into results/NAME.json; NAME is made of the run's model,
preset, steps and seed, or of the search's name, if not given.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys
from typing import Any

from benchmarks import reporting
from fastcifar.training import recipe


def content(folder: pathlib.Path) -> dict[str, Any]:
    """What is stored of a finished run or search."""
    found = {key: json.loads((folder / f"{key}.json").read_text()) for key in ("result", "env")}
    if (folder / "config.yaml").exists():
        config = recipe.read_config(str(folder / "config.yaml"))
        found["config"] = {key: reporting.last_part(value) for key, value in config.items()}
    found["date"] = datetime.datetime.fromtimestamp((folder / "result.json").stat().st_mtime).strftime("%Y-%m-%d")
    found["env"]["command"] = [reporting.last_part(word) for word in found["env"].get("command", [])]
    return found


def main(folder: str, name: str | None = None) -> None:
    """Stores what is in that folder, under that name."""
    found = content(pathlib.Path(folder))
    result = found["result"]
    if name is None and "study" in result:
        name = f"search-{result['study']}"
    name = name or f"run-{result['model']}-{result['preset']}-{result['steps']}-seed{result['seed']}"
    path = reporting.RESULTS / f"{name}.json"
    if path.exists() and json.loads(path.read_text()).get("config") != found.get("config"):
        raise SystemExit(f"{path.name} holds a run with other options; give this one another NAME")
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
