"""`python -m benchmarks.static`: every kernel compiled ahead of time for sm_80, sm_90 and sm_100; needs no GPU.

Each module named in `fastcifar.kernels.triton.KERNEL_MODULES` lists its compilations by `static_cases()`: objects with
`label`, `kernel` (the jitted function), `types` (argument → "*fp32", "i32", …), `constants` (constexpr → value),
`aligned` (arguments that are multiples of 16), `num_warps` and `wide`: the pointers whose every access must move at
least 64 bits a thread, or True where the widest load must, or False. With nvcc the .cu files of the compiled module
are read too.

The gate: no stack, no local memory, and accesses as wide as the case demands. Prints a table and the rows that fail,
writes results/static.json; exit status 1 where the gate does not hold, 2 where nothing could be compiled.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine_code, reporting

CAPABILITIES = (80, 90, 100)
WIDE = 64
ROOT = pathlib.Path(__file__).resolve().parent.parent
NATIVE = ROOT / "kernels" / "native"
COLUMNS = ("registers", "stack", "spills", "shared", "warps_per_sm", "load_bits", "store_bits", "demanded_bits")


def cache_folder() -> pathlib.Path:
    """Where rows are kept, by what they depend on, so that unchanged kernels are not compiled again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fastcifar" / "static"


class Worker:
    """A process that compiles (see `static_worker`); started anew after a crash."""

    def __init__(self, triton_cache: str):
        self._environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        # What Triton 3.9 does by default and 3.10 will not.
        self._environment["TRITON_DEFAULT_FP_FUSION"] = "1"
        self._environment["TRITON_CACHE_DIR"] = triton_cache
        paths = [str(ROOT), *(path for path in sys.path if path)]
        self._environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._process: subprocess.Popen | None = None

    def ask(self, job: Mapping[str, Any]) -> Any:
        """The answer to a job.

        Raises:
            RuntimeError: the job failed, or the process died of it; the message says how.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.static_worker"],
                env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._process = None
            raise RuntimeError(f"the compiling process died with status {status}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()


def kernel_modules() -> list[str]:
    """Full names of the modules that list cases."""
    package = "fastcifar.kernels.triton"
    return [f"{package}.{name}" for name in importlib.import_module(package).KERNEL_MODULES]


def _cached(key: str, capability: int, cache: pathlib.Path | None) -> tuple[pathlib.Path | None, Any]:
    if cache is None:
        return None, None
    place = cache / f"{key}-{capability}.json"
    try:
        return place, json.loads(place.read_text())
    except (OSError, ValueError):
        return place, None


def _keep(place: pathlib.Path | None, value: Any) -> None:
    """Whole or not at all: two reports may run at once."""
    if place is None:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, place)


def _chosen(
    descriptions: Sequence[Mapping[str, Any]], match: str, per_kernel: int | None
) -> list[tuple[int, Mapping[str, Any]]]:
    taken: collections.Counter[str] = collections.Counter()
    chosen = []
    for index, description in enumerate(descriptions):
        taken[description["kernel"]] += match in description["case"]
        if match in description["case"] and (per_kernel is None or taken[description["kernel"]] <= per_kernel):
            chosen.append((index, description))
    return chosen


def current_keys(modules: Sequence[str]) -> dict[str, str]:
    """Key and label of every case of these modules, as a row of `measure_triton` has them; compiles nothing.

    Raises:
        RuntimeError: a module cannot list its cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(folder)
        try:
            return {row["key"]: row["case"] for module in modules for row in worker.ask({"module": module})}
        finally:
            worker.close()


def measure_triton(
    modules: Sequence[str],
    *,
    capabilities: Sequence[int] = CAPABILITIES,
    match: str = "",
    per_kernel: int | None = None,
    workers: int = 2,
    cache: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """A row for each case of these modules whose label holds `match`, and each compute capability × 10.

    A row has "case", "kernel", "sm", "wide", "key" (a hash of what the compilation depends on) and either what
    `static_worker.compile_case` tells or "error". `per_kernel` takes only that many cases of each kernel.

    Raises:
        RuntimeError: a module cannot list its cases.
    """
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as triton_cache:
        crew = [Worker(triton_cache) for _ in range(workers)]
        for worker in crew:
            free.put(worker)

        def compile_one(module: str, index: int, description: Mapping[str, Any], capability: int) -> dict[str, Any]:
            row = {**description, "sm": capability}
            place, usage = _cached(description["key"], capability, cache)
            if usage is None:
                worker = free.get()
                try:
                    usage = worker.ask({"module": module, "index": index, "capability": capability})
                    _keep(place, usage)
                except RuntimeError as error:
                    usage = {"error": str(error)}
                finally:
                    free.put(worker)
            return row | usage

        try:
            jobs = [
                (module, index, description, capability)
                for module in modules
                for index, description in _chosen(crew[0].ask({"module": module}), match, per_kernel)
                for capability in capabilities
            ]
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                return list(pool.map(lambda job: compile_one(*job), jobs))
        finally:
            for worker in crew:
                worker.close()


def measure_native(
    *, capabilities: Sequence[int] = CAPABILITIES, folder: pathlib.Path = NATIVE, cache: pathlib.Path | None = None
) -> list[dict[str, Any]]:
    """Rows like `measure_triton`'s for every kernel of the .cu files in a folder; none without nvcc or .cu files."""
    nvcc, sources = shutil.which("nvcc"), sorted(folder.glob("*.cu"))
    if nvcc is None or not sources:
        return []
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(version.encode())
    for path in [*sorted(folder.glob("*.h")), pathlib.Path(machine_code.__file__)]:
        digest.update(path.read_bytes())
    rows = []
    for source in sources:
        key = hashlib.sha256(digest.digest() + source.read_bytes()).hexdigest()
        for capability in capabilities:
            place, functions = _cached(key, capability, cache)
            facts = {"wide": False, "sm": capability}
            if functions is None:
                try:
                    functions = machine_code.read_cubin(machine_code.compile_cuda(nvcc, source, capability))
                    _keep(place, functions)
                except RuntimeError as error:
                    rows.append({"case": source.name, "kernel": source.name, **facts, "error": str(error)})
                    continue
            for name, usage in zip(machine_code.plain_names([*functions]), functions.values(), strict=True):
                rows.append({"case": f"{source.name}: {name}", "kernel": name, **facts, **usage, "warps_per_sm": None})
    return rows


def _narrow(row: Mapping[str, Any]) -> list[str]:
    """Accesses that are narrower than the case demands."""
    if isinstance(row["wide"], bool):
        narrow = row["wide"] and row["load_bits"] < WIDE
        return [f"the widest global load moves {row['load_bits']} bits, {WIDE} are demanded"] if narrow else []
    reasons = []
    for name in row["wide"]:
        kinds = row["arguments"].get(name, {})
        if not kinds:
            reasons.append(f"{name} is never accessed, {WIDE} bits at a time are demanded")
        for kind, widths in kinds.items():
            if widths[0] < WIDE:
                reasons.append(f"a {kind} of {name} moves {widths[0]} bits, {WIDE} are demanded")
    return reasons


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What breaks the gate, a line for each row that does."""
    lines = []
    for row in rows:
        if "error" in row:
            reasons = [f"does not compile: {row['error']}"]
        else:
            reasons = []
            if row["stack"] or row["local"]:
                reasons.append(f"{row['stack']} bytes of stack, {row['local']} of local memory")
            if row["local_loads"] or row["local_stores"]:
                reasons.append(f"{row['local_loads']} loads and {row['local_stores']} stores of spilled registers")
            reasons += _narrow(row)
        if reasons:
            lines.append(f"{row['case']} on sm_{row['sm']}: {'; '.join(reasons)}")
    return lines


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in row:
        return dict.fromkeys(COLUMNS)
    demanded = () if isinstance(row["wide"], bool) else row["wide"]
    widths = [kinds[kind][0] for name in demanded for kinds in [row["arguments"].get(name, {})] for kind in kinds]
    spills = row["local_loads"] + row["local_stores"]
    return {**row, "spills": spills, "demanded_bits": min(widths, default=None)}


def all_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the table shows them, one a compilation."""
    return [{"case": row["case"], "sm": row["sm"], **{key: _columns(row)[key] for key in COLUMNS}} for row in rows]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The worst of each kernel and compute capability: most registers and spills, fewest warps, narrowest accesses.

    load_bits and store_bits are the widest of a compilation, demanded_bits the narrowest of the demanded pointers.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["sm"]), []).append(_columns(row))
    best = {"warps_per_sm": min, "load_bits": min, "store_bits": min, "demanded_bits": min}
    return [
        {"kernel": kernel, "sm": capability, "cases": len(group)}
        | {
            key: best.get(key, max)((row[key] for row in group if row[key] is not None), default=None)
            for key in COLUMNS
        }
        for (kernel, capability), group in groups.items()
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.split("\n\n")[0])
    parser.add_argument("--match", default="", help="only cases whose label holds this text; stores no result")
    parser.add_argument("--module", action="append", help="full name of a module with static_cases(), instead of ours")
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES, help="compute capabilities × 10")
    parser.add_argument("--all", action="store_true", help="a line a compilation, instead of the worst of each kernel")
    parser.add_argument("--no-cache", action="store_true", help="compile everything again")
    parser.add_argument("--workers", type=int, default=2, help="compiling processes")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON, instead of benchmarks/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints, writes the JSON; returns the exit status."""
    options = _parse(arguments)
    cache = None if options.no_cache else cache_folder()
    try:
        rows = measure_triton(
            options.module or kernel_modules(),
            capabilities=options.sm, match=options.match, workers=options.workers, cache=cache,
        )  # fmt: skip
    except (ImportError, RuntimeError) as error:
        print(f"benchmarks.static: the kernels cannot be listed: {error}", file=sys.stderr)
        return 2
    if not options.module and not options.match:
        rows += measure_native(capabilities=options.sm, cache=cache)
        if shutil.which("nvcc") is None:
            print("nvcc is not on the PATH: the .cu files of the compiled module are left out")
    if not rows:
        print(f"benchmarks.static: no case's label holds {options.match!r}", file=sys.stderr)
        return 2
    print(reporting.table(all_rows(rows) if options.all else summary(rows)))
    if options.output or not (options.match or options.module):
        versions = {"triton": importlib.metadata.version("triton"), "capabilities": list(options.sm)}
        print(reporting.save("static", {**versions, "rows": rows}, options.output))
    broken = failures(rows)
    print(f"{len(rows)} compilations, {len(broken)} break the gate (no stack, no local memory, wide loads)")
    for line in broken:
        print(f"- {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
