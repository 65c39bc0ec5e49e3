"""`python -m benchmarks.compare BASE`: how fast the working tree is beside another revision, in turns.

Both are installed into temporary folders: BASE (a commit, tag or branch) from a worktree of git, the working tree with
its uncommitted changes from a copy. Processes of the two take turns; a process measures the fused operators and a
training step of ds_resnet in turns. Printed are medians and the median ratio of a pair of processes with its range.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
NATIVE = ("CMakeLists.txt", "pyproject.toml", "kernels/native")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


@contextlib.contextmanager
def sources(base: str, folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Trees of the base and of the working tree as it is.

    Raises:
        ValueError: git does not know the base.
    """
    commit = _git("rev-parse", "--verify", f"{base}^{{commit}}").strip()
    before, after = folder / "base", folder / "work"
    _git("worktree", "add", "--detach", str(before), commit)
    try:
        for name in _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
            if name and (ROOT / name).is_file():
                (after / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, after / name)
        yield before, after
    finally:
        _git("worktree", "remove", "--force", str(before))


def native_hash(tree: pathlib.Path) -> str:
    """Of all that the compiled module is made from."""
    found = hashlib.sha256()
    for name in NATIVE:
        for path in sorted((tree / name).rglob("*")) if (tree / name).is_dir() else [tree / name]:
            if path.is_file():
                found.update(f"{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def cache_folder() -> pathlib.Path:
    """Where compiled modules are kept by what they are made from: compiling takes minutes."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fastcifar" / "compare"


def install(tree: pathlib.Path, site: pathlib.Path) -> None:
    """Installs a tree into a folder of its own, with the compiled module of an earlier comparison where that fits.

    Raises:
        ValueError: pip failed; the message holds its last lines.
    """
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment.get("PATH", "")])
    kept = cache_folder() / f"{sys.implementation.cache_tag}-{native_hash(tree)}"
    known = any(kept.glob("_native*"))
    if known:
        environment["FASTCIFAR_PURE_PYTHON"] = "1"
    print(f"installing {tree.name}{'' if known else ': compiling takes minutes'}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(site), str(tree)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"installing {tree} failed:\n" + "\n".join(done.stderr.strip().splitlines()[-8:]))
    kernels = site / "fastcifar" / "kernels"
    for module in (kept if known else kernels).glob("_native*"):
        (kernels if known else kept).mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, kernels if known else kept)


def measure(match: str) -> dict[str, float]:
    """Median seconds of every case whose name holds this text; run in a process of its own.

    Raises:
        ArithmeticError: an operator does not agree with float64.
    """
    # An editable installation must not answer for the folder under test.
    sys.meta_path = [finder for finder in sys.meta_path if "_editable" not in type(finder).__module__]
    import torch

    from benchmarks import agreement, operators, timing, training_step
    from fastcifar import models, native

    native.tune_allocator()
    found = {}
    l2 = "cold" if timing.DEVICE.type == "cuda" else None
    for make in operators.makers(torch.bfloat16):
        subject = operators.tiny(make)
        name = operators.ours(subject) or "reference"
        if match not in f"{subject.operator} {'-'.join(map(str, make.args[0]))}":
            continue
        tried = {which: subject.variant(which).results for which in dict.fromkeys((name, "reference"))}
        agreement.refused(tried, subject.exact(), eager="reference", ours=name, eps=torch.finfo(torch.bfloat16).eps)
        subject = make()
        calls = {f"{subject.operator} {subject.label}": subject.variant(name).step}
        found |= timing.medians(timing.in_turns(calls, rounds=30, budget=0.7, l2=l2))
    if match in "step of ds_resnet":
        batch = training_step.loader(512 if timing.DEVICE.type == "cuda" else 128, torch.bfloat16).batch(0)
        step = training_step.Step(models.create_model("ds_resnet"), batch.images.float(), batch.labels)
        found |= timing.medians(timing.in_turns({"step of ds_resnet": step.step}, rounds=30, budget=3.0))
    return found


def _run(site: pathlib.Path, benchmarks: pathlib.Path, match: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(benchmarks)])}
    command = [sys.executable, "-m", "benchmarks.compare", "--measure", "--match", match, "-"]
    done = subprocess.run(command, cwd=benchmarks, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"measuring {site.name} failed:\n" + "\n".join(done.stderr.strip().splitlines()[-8:]))
    *_, last = done.stdout.strip().splitlines()
    answer = json.loads(last)
    if not answer["package"].startswith(str(site)):
        raise ValueError(f"{answer['package']} was measured instead of {site}")
    if not answer["seconds"]:
        raise ValueError(f"--match {match!r}: no case has such a name")
    return answer["seconds"]


def compare(base: str, *, pairs: int, match: str) -> list[dict[str, float | str]]:
    """Rows of cases: medians of both revisions, ratio of the working tree to the base and its range over pairs.

    Raises:
        ValueError: no such base, an installation or a measurement that failed, or nothing to measure.
    """
    with tempfile.TemporaryDirectory(prefix="fastcifar-compare-") as name:
        folder = pathlib.Path(name)
        with sources(base, folder) as (before, after):
            shutil.copytree(
                ROOT / "benchmarks", folder / "run" / "benchmarks", ignore=shutil.ignore_patterns("results")
            )
            sites = folder / "site-base", folder / "site-work"
            install(before, sites[0])
            install(after, sites[1])
        rounds: list[list[dict[str, float]]] = [[], []]
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                rounds[which].append(_run(sites[which], folder / "run", match))
            print(f"pair {pair + 1} of {pairs}", file=sys.stderr)
    rows = []
    for case in rounds[0][0]:
        a, b = ([times[case] for times in side] for side in rounds)
        ratios = [y / x for x, y in zip(a, b, strict=True)]
        row = {"case": case, "base, ms": 1e3 * statistics.median(a), "working tree, ms": 1e3 * statistics.median(b)}
        row |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares and prints; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("base", metavar="BASE", help="commit, tag or branch to compare with")
    parser.add_argument("--pairs", type=int, default=3, help="processes of each revision (default 3)")
    parser.add_argument(
        "--match", default="", help="only cases whose name holds this: 'step', 'batch_norm', '512-32-32-3-1'"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        seconds = measure(options.match)
        import fastcifar

        print(json.dumps({"package": fastcifar.__file__, "seconds": seconds}))
        return 0
    try:
        rows = compare(options.base, pairs=options.pairs, match=options.match)
    except ValueError as error:
        print(f"python -m benchmarks.compare: error: {error}", file=sys.stderr)
        return 2
    from benchmarks import reporting

    facts = reporting.circumstances()
    print(reporting.table(rows))
    print(f"\n{facts['command']}, {facts['date']}, torch {facts['torch']}, {facts.get('gpu', facts['processor'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
