"""`python -m benchmarks.static`: every Triton kernel compiled ahead of time, no GPU needed.

Compiles each case for sm_80, sm_90 and sm_100, reads registers, stack, spills and shared memory from the compiled
code and the widest global access from its instructions. The gate: no spill, no local memory, and vectorised access
where the case promises it. Writes results/static.json; exit status 1 where the gate does not hold.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

CAPABILITIES = (80, 90, 100)
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "fastcifar" / "static"


def list_cases() -> list[Any]:
    """All cases of all kernel modules."""
    package = importlib.import_module("fastcifar.kernels.triton")
    cases = []
    for name in package.KERNEL_MODULES:
        cases += importlib.import_module(f"fastcifar.kernels.triton.{name}").static_cases()
    return cases


def _sources() -> str:
    """A hash of all kernel sources and of Triton's version: what a compilation depends on."""
    import triton

    package = importlib.import_module("fastcifar.kernels.triton")
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(pathlib.Path(package.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    digest.update(pathlib.Path(__file__).read_bytes())
    return digest.hexdigest()


def compile_case(case: Any, capability: int) -> bytes:
    """The case's machine code (a cubin) for this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def _tool(name: str) -> str:
    import triton

    bundled = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else name


def read_usage(cubin: bytes) -> dict[str, Any]:
    """Registers, stack bytes, shared bytes, local accesses, and the widest global load and store, in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    if code.returncode:
        raise RuntimeError(f"nvdisasm failed: {code.stderr.strip()}")
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "shared": numbers["SHARED"],
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)),
        "load_bits": _widest(r"\bLDG\S*", code.stdout),
        "store_bits": _widest(r"\bSTG\S*", code.stdout),
    }


def _widest(pattern: str, code: str) -> int:
    widths = [0]
    for name in re.findall(pattern, code):
        found = re.search(r"\.(256|128|64|[US]?16|[US]?8)\b", name)
        widths.append(int(re.sub(r"\D", "", found.group(1))) if found else 32)
    return max(widths)


def _measure(index: int, capability: int) -> dict[str, Any]:
    case = list_cases()[index]
    usage = read_usage(compile_case(case, capability))
    return {"kernel": case.label, "sm": capability, **usage, "wide": case.wide}


def _work(job: tuple[int, int]) -> dict[str, Any]:
    return _measure(*job)


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What breaks the gate, a line each."""
    lines = []
    for row in rows:
        name = f"{row['kernel']} on sm_{row['sm']}"
        if row["stack"] or row["local"]:
            lines.append(f"{name}: {row['stack']} bytes of stack, {row['local']} local accesses")
        if row["wide"] and row["load_bits"] < 64:
            lines.append(f"{name}: widest load {row['load_bits']} bits, must be 64")
    return lines


def measure(pattern: str = "", capabilities: tuple[int, ...] = CAPABILITIES, workers: int = 2) -> list[dict[str, Any]]:
    """A row for each case whose label holds `pattern` and each capability; unchanged kernels come from a cache."""
    os.environ.pop("TRITON_INTERPRET", None)
    cases, sources = list_cases(), _sources()
    _CACHE.mkdir(parents=True, exist_ok=True)
    rows, jobs = {}, []
    for index, case in enumerate(cases):
        for capability in capabilities:
            if pattern in case.label:
                place = _CACHE / f"{hashlib.sha256(f'{sources} {case.label} {capability}'.encode()).hexdigest()}.json"
                if place.exists():
                    rows[index, capability] = json.loads(place.read_text())
                else:
                    jobs.append((index, capability, place))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for (index, capability, place), row in zip(
            jobs, pool.map(_work, [job[:2] for job in jobs], chunksize=4), strict=True
        ):
            rows[index, capability] = row
            place.write_text(json.dumps(row))
    return [rows[key] for key in sorted(rows)]


def main() -> int:
    """Compiles, prints the table, writes the JSON; the exit status."""
    from benchmarks import reporting

    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--match", default="", help="only cases whose label holds this text")
    parser.add_argument("--sm", type=int, nargs="+", default=list(CAPABILITIES), help="compute capabilities × 10")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the JSON")
    options = parser.parse_args()
    rows = measure(options.match, tuple(options.sm))
    print(reporting.table(rows))
    broken = failures(rows)
    import triton

    if not options.match:
        print(reporting.save("static", {"triton": triton.__version__, "rows": rows}, options.output))
    print(f"{len(rows)} compilations, {len(broken)} break the gate")
    for line in broken:
        print(f"- {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
