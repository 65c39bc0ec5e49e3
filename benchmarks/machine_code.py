"""What a compiled kernel costs, read from its machine code: registers, local memory, widths of global accesses."""

from __future__ import annotations

import collections
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

# Shared memory of one multiprocessor in bytes, by compute capability × 10.
_SHARED = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 103: 228 << 10, 120: 100 << 10}
_REGISTERS, _WARPS = 65536, 64

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_LOADS, _STORES = {"LDG", "LDGSTS", "LD"}, {"STG", "ST"}


def find_tool(name: str) -> str | None:
    """Path of a CUDA tool: the one that came with Triton, else the one on the PATH, else None."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        bundled = pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if bundled.is_file():
            return str(bundled)
    return shutil.which(name)


def access_bits(opcode: str) -> int:
    """Bits that one thread moves by this load or store: 64 for "LDG.E.64.CONSTANT", 32 where none are named."""
    for part in opcode.split(".")[1:]:
        if re.fullmatch(r"256|128|64|[US]?16|[US]?8", part):
            return int(part.lstrip("US"))
    return 32


def count_accesses(code: str) -> dict[str, Any]:
    """Global and local memory instructions of a disassembly, as `read_cubin` gives them for each function."""
    loads, stores, local = collections.Counter(), collections.Counter(), collections.Counter()
    for opcode in _INSTRUCTION.findall(code):
        kind = opcode.split(".")[0]
        if kind in _LOADS:
            loads[access_bits(opcode)] += 1
        elif kind in _STORES:
            stores[access_bits(opcode)] += 1
        elif kind in ("LDL", "STL"):
            local[kind] += 1
    return {
        "local_loads": local["LDL"],
        "local_stores": local["STL"],
        "load_bits": max(loads, default=0),
        "store_bits": max(stores, default=0),
        "loads": {str(bits): number for bits, number in sorted(loads.items())},
        "stores": {str(bits): number for bits, number in sorted(stores.items())},
    }


def _origins(instructions: list[tuple[str, str]]) -> dict[str, set[int]]:
    """The parameters that each 64-bit register's value was computed from."""
    origins: dict[str, set[int]] = {}
    edges = []
    for opcode, operands in instructions:
        registers = re.findall(r"%rd\d+", operands)
        parameter = re.search(r"_param_(\d+)\]", operands)
        if opcode.startswith("ld.param") and registers and parameter:
            origins.setdefault(registers[0], set()).add(int(parameter.group(1)))
        elif operands.startswith("%rd") and not opcode.startswith("ld."):
            edges.append((registers[0], registers[1:]))
    changed = True
    while changed:
        changed = False
        for target, sources in edges:
            found = set().union(*(origins.get(source, ()) for source in sources))
            known = origins.setdefault(target, set())
            changed |= not found <= known
            known |= found
    return origins


def pointer_accesses(ptx: str, names: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Which widths each pointer argument is accessed with: {"x_ptr": {"load": [64]}, "z_ptr": {"store": [32, 64]}}.

    Follows addresses from the kernel's parameters through the PTX, so that a wide load of a small vector does not hide
    a narrow one of a large tensor. `names` are the run-time arguments in order; widths in bits a thread, ascending.
    """
    instructions = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;\n]*);", ptx, re.MULTILINE)
    origins = _origins(instructions)
    found: dict[str, dict[str, set[int]]] = {}
    for opcode, operands in instructions:
        address = re.findall(r"\[\s*(%rd\d+)", operands)
        if ".global" not in opcode or not address:
            continue
        if opcode.startswith("cp.async"):
            size = re.findall(r"\b(?:0x[0-9a-f]+|\d+)\b", operands.rpartition("]")[2])
            kind, bits = "load", 8 * int(size[0], 0) if size else 0
        elif opcode.startswith(("ld.", "st.")):
            vector, element = re.search(r"\.v(\d)\b", opcode), re.search(r"\.[bfus](\d+)$", opcode)
            kind = "load" if opcode.startswith("ld.") else "store"
            bits = (int(vector.group(1)) if vector else 1) * int(element.group(1))
        else:
            continue
        for index in origins.get(address[-1], ()):
            found.setdefault(names[index], {}).setdefault(kind, set()).add(bits)
    return {name: {kind: sorted(widths) for kind, widths in kinds.items()} for name, kinds in sorted(found.items())}


def parse_usage(text: str) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack, local and shared memory of each function in cuobjdump's resource usage."""
    found = {}
    for name, line in re.findall(r"^ Function (\S+):\s*\n\s*(.*)$", text, re.MULTILINE):
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        found[name] = {
            "registers": numbers["REG"],
            "stack": numbers["STACK"],
            "local": numbers["LOCAL"],
            "shared": numbers["SHARED"],
        }
    return found


def read_cubin(cubin: bytes) -> dict[str, dict[str, Any]]:
    """Resources and memory instructions of each function in a cubin.

    Keys: registers a thread; stack, local and shared memory in bytes; local_loads and local_stores as numbers of
    instructions; load_bits and store_bits, the widest global access of a thread; loads and stores, the number of
    instructions by width.

    Raises:
        RuntimeError: cuobjdump is missing or fails; the message holds its words.
    """
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump is missing; install triton for NVIDIA GPUs, or the CUDA toolkit")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_output(tool, option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    sections = re.split(r"^\s*Function : (\S+)\s*$", code, flags=re.MULTILINE)
    accesses = {name: count_accesses(body) for name, body in zip(sections[1::2], sections[2::2], strict=True)}
    functions = {name: {**numbers, **accesses[name]} for name, numbers in parse_usage(usage).items()}
    if not functions:
        raise RuntimeError(f"cuobjdump found no function in the cubin: {usage.strip()}")
    return functions


def _output(*command: str) -> str:
    end = subprocess.run(command, capture_output=True, text=True)
    if end.returncode:
        raise RuntimeError(f"{pathlib.Path(command[0]).name} failed: {end.stderr.strip() or end.stdout.strip()}")
    return end.stdout


def resident_warps(capability: int, *, registers: int, shared: int, warps: int) -> int | None:
    """Warps that one multiprocessor holds at once for programs of `warps` warps; None for unknown capabilities.

    Source: the occupancy rules of the CUDA programming guide (registers are given out 256 at a time to a warp).
    """
    if capability not in _SHARED:
        return None
    by_registers = _REGISTERS // (-(-max(registers, 1) * 32 // 256) * 256) // warps
    # A block takes 1 KiB of shared memory for itself from sm_80 on.
    by_shared = _SHARED[capability] // (shared + 1024)
    return min(by_registers, by_shared, _WARPS // warps) * warps


def compile_cuda(nvcc: str, source: pathlib.Path, capability: int) -> bytes:
    """The cubin of one .cu file.

    Raises:
        RuntimeError: nvcc does not compile it; the message holds its words.
    """
    architecture = f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "out.cubin"
        _output(
            nvcc, "-cubin", "-O3", "-std=c++17", f"-arch={architecture}", "-DFASTCIFAR_CUDA=1",
            f"-I{source.parent}", "-o", str(cubin), str(source),
        )  # fmt: skip
        return cubin.read_bytes()


def plain_names(names: list[str]) -> list[str]:
    """C++ names as people write them, without namespaces and arguments; as they are where c++filt is missing."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    end = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    plain = end.stdout.splitlines()
    if end.returncode or len(plain) != len(names):
        return names
    plain = [name.replace("(anonymous namespace)::", "").removeprefix("void ") for name in plain]
    return [re.sub(r"\b\w+::", "", re.sub(r"\(.*", "", name)) for name in plain]
