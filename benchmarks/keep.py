"""`python -m benchmarks.keep RUN NAME`: stores a training run's result among the measurements.

Merges result.json, config.yaml's options and env.json of a run folder into results/NAME.json.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys

from benchmarks import reporting


def main(run: str, name: str) -> None:
    """Stores the run of that folder under that name."""
    folder = pathlib.Path(run)
    content = {key: json.loads((folder / f"{key}.json").read_text()) for key in ("result", "env")}
    finished = datetime.datetime.fromtimestamp((folder / "result.json").stat().st_mtime)
    content["date"] = finished.strftime("%Y-%m-%d")
    # Where things lay on this machine tells nobody anything.
    command = content["env"].get("command", [])
    content["env"]["command"] = [pathlib.Path(word).name if word.startswith("/") else word for word in command]
    path = reporting.RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
