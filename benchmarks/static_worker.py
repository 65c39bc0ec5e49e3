"""The process in which `benchmarks.static` compiles: one job a line on stdin, one answer a line on stdout, as JSON.

A process of its own, because Triton's interpreter must be off before the kernels are imported and because a compiler
that crashes must not take the report with it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine_code

FIELDS = ("label", "kernel", "types", "constants", "aligned", "num_warps", "wide")


@functools.cache
def cases(module: str) -> Sequence[Any]:
    """What the module's `static_cases()` yields.

    Raises:
        AttributeError: a case lacks one of `FIELDS`.
    """
    found = list(importlib.import_module(module).static_cases())
    for index, case in enumerate(found):
        missing = [field for field in FIELDS if not hasattr(case, field)]
        if missing:
            raise AttributeError(f"case {index} of {module}.static_cases() has no {', '.join(missing)}")
    return found


@functools.cache
def _tools() -> str:
    """What a compilation depends on beside the case: Triton, and the code that reads the result."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for file in (__file__, machine_code.__file__):
        digest.update(pathlib.Path(file).read_bytes())
    return digest.hexdigest()


def describe(case: Any) -> dict[str, Any]:
    """Label, kernel, demanded widths and a key that changes with whatever the compilation depends on."""
    facts = [_tools(), case.kernel.cache_key, case.label, case.num_warps, sorted(case.aligned)]
    facts += [sorted(case.types.items()), sorted(case.constants.items())]
    return {
        "case": case.label,
        "kernel": case.kernel.fn.__name__,
        "wide": case.wide if isinstance(case.wide, bool) else sorted(case.wide),
        "key": hashlib.sha256(repr(facts).encode()).hexdigest(),
    }


def compile_case(case: Any, capability: int) -> dict[str, Any]:
    """Compiles for this compute capability × 10 and reads what came out (see `machine_code.read_cubin`)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = sorted({*case.types, *case.constants, *case.aligned} - {*names})
    missing = sorted({*names} - {*case.types, *case.constants})
    if unknown or missing:
        raise ValueError(f"arguments unknown to the kernel: {unknown}; not given a type: {missing}")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": case.num_warps})
    functions = machine_code.read_cubin(compiled.asm["cubin"])
    row = functions[compiled.metadata.name]
    # A tuple of arguments arrives as so many parameters.
    kinds = [(name, case.types[name]) for name in names if name in case.types]
    run_time = [name for name, kind in kinds for _ in (kind if isinstance(kind, tuple) else (kind,))]
    row["arguments"] = machine_code.pointer_accesses(compiled.asm["ptx"], run_time)
    # What Triton asks for at launch; the cubin itself says nothing of it.
    row["shared"] += compiled.metadata.shared
    row["warps_per_sm"] = machine_code.resident_warps(
        capability, registers=row["registers"], shared=row["shared"], warps=case.num_warps
    )
    return row


def answer(job: Mapping[str, Any]) -> Any:
    """{"module"} → descriptions of all its cases; {"module", "index", "capability"} → the row of one compilation."""
    found = cases(job["module"])
    if "index" not in job:
        return [describe(case) for case in found]
    return compile_case(found[job["index"]], job["capability"])


def main() -> None:
    """Answers jobs until stdin ends; {"error": …} where a job fails."""
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = {"value": answer(json.loads(line))}
        except Exception as error:
            words = str(error).strip().splitlines()
            reply = {"error": f"{type(error).__name__}: {words[0] if words else ''}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
