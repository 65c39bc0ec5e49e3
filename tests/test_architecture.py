"""The house keeps its order: who may import whom, what nobody may call, how long things get."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("fastcifar", "kernels")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 350, 50

# Each layer may import those below it; the ground is open to all.
LAYERS = [
    {"train", "evaluate", "generate", "export", "doctor", "command_line"},
    {"training"},
    {"models", "data", "metrics"},
    {"nn", "fuse", "fusing"},
    {"functional"},
    {"ops"},
    {"reference", "reference_spectral", "reference_aw_hinge", "kernels"},
]
GROUND = {"validation", "native", "profiling"}
# dispatch chooses for functional and loads what it chose; the package's own file lists names that it loads lazily.
ABOVE_ITS_PLACE = {("dispatch", "ops"), ("dispatch", "reference"), ("dispatch", "reference_aw_hinge")}
DISPATCH_USERS = {"functional", "nn", "training", "doctor", "fuse", "fusing", "ops", "benchmarks"}


def layer_of(part):
    return next((index for index, layer in enumerate(LAYERS) if part in layer), None)


def part_of(module):
    """The second name of a module of the package: "nn" of fastcifar.nn.depthwise, "" of the package itself."""
    return module.split(".")[1] if "." in module else ""


def imports(tree, module, is_package):
    """Absolute names of everything that a module imports, at any depth of its code."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def check_import(importer, imported):
    """None, or why this import breaks the order; both are parts of the package."""
    if imported in GROUND | {importer, ""} or (importer, imported) in ABOVE_ITS_PLACE:
        return None
    if importer in GROUND:
        return f"{importer} is the ground and must not import {imported}"
    if imported == "dispatch":
        return None if importer in DISPATCH_USERS else f"{importer} must not choose implementations"
    if importer == "training" and imported in ("ops", "kernels", "reference"):
        return f"training uses nn and functional, not {imported}"
    above, below = layer_of(importer), layer_of(imported)
    if above is None or below is None:
        unknown = importer if above is None else imported
        return f"{unknown} has no layer yet; give it one in LAYERS"
    if below < above:
        return f"{importer} must not import {imported}, which stands above it"
    return None


FORBIDDEN = [
    (r"pickle\.(load|loads|Pickler)$", "nothing is unpickled"),
    (r"(torch|joblib)\.load$", "checkpoints are safetensors and JSON"),
    (r"(eval|exec|compile|__import__)$", "no text becomes code"),
    (r"os\.(system|popen)$", "no shell"),
    (r"yaml\.(load|unsafe_load|full_load)$", "only yaml.safe_load"),
    (r".*libdevice\.fast_.*", "no approximate mathematics"),
    (r"(tl|triton\.language)\.atomic_.*", "results do not depend on the order of programs"),
]


def dotted(node):
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else None
    return node.id if isinstance(node, ast.Name) else None


def forbidden_calls(tree):
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func) or ""
        for pattern, reason in FORBIDDEN:
            if re.fullmatch(pattern, name):
                yield f"line {node.lineno}: {name}: {reason}"
        for keyword in node.keywords:
            if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                yield f"line {node.lineno}: shell=…: no shell"


def long_functions(tree):
    """Functions of more than MAX_FUNCTION lines, not counting signature and docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = node.end_lineno - body[0].lineno + 1
            if length > MAX_FUNCTION:
                yield f"{node.name}: {length} lines"


def missing_docstrings(tree):
    if ast.get_docstring(tree) is None:
        yield "the module"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.name
            for member in getattr(node, "body", []):
                public = isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
                # A module's class says what its forward takes and gives.
                if isinstance(node, ast.ClassDef) and public and member.name != "forward":
                    if ast.get_docstring(member) is None:
                        yield f"{node.name}.{member.name}"


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastcifar")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def names(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_a_file_keeps_the_house_rules(path):
    tree, module = tree_of(path), module_name(path)
    problems = [f"{path.name} has {n} lines" for n in [len(path.read_text().splitlines())] if n > MAX_FILE]
    problems += [*long_functions(tree), *forbidden_calls(tree)]
    problems += [f"{name} has no docstring" for name in missing_docstrings(tree)]
    importer = part_of(module)
    for imported in imports(tree, module, path.name == "__init__.py"):
        if imported.split(".")[0] == "kernels":
            problems.append(f"{imported}: the subpackage is called fastcifar.kernels")
        if imported.split(".")[0] == "fastcifar" and module != "fastcifar":
            problems += filter(None, [check_import(importer, part_of(imported))])
    assert not problems


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "kernels")], ids=names)
def test_kernels_know_nothing_of_the_package(path):
    outside = [name for name in imports(tree_of(path), module_name(path), path.name == "__init__.py")]
    assert not [n for n in outside if n.startswith("fastcifar") and not n.startswith("fastcifar.kernels")]


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("kernels", "functional"),
        ("training", "ops"),
        ("training", "kernels"),
        ("nn", "models"),
        ("data", "training"),
        ("functional", "nn"),
        ("ops", "functional"),
        ("validation", "nn"),
        ("models", "dispatch"),
        ("reference", "ops"),
        ("models", "novelty"),
    ],
    ids=lambda part: part,
)
def test_the_order_can_be_broken(importer, imported):
    assert check_import(importer, imported)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import yaml\nyaml.load('x', None)",
        "import triton.language as tl\ntl.atomic_add(p, 1.0)",
    ],
    ids=["pickle", "torch.load", "eval", "system", "shell", "yaml", "atomic"],
)
def test_forbidden_calls_are_seen(source):
    assert list(forbidden_calls(ast.parse(source)))


def test_long_functions_and_missing_docstrings_are_seen():
    source = "def long():\n" + "    x = 1\n" * (MAX_FUNCTION + 1)
    assert list(long_functions(ast.parse(source)))
    assert list(missing_docstrings(ast.parse(source))) == ["the module", "long"]
    assert list(imports(ast.parse("from ..ops import depthwise"), "fastcifar.nn.depthwise", False)) == [
        "fastcifar.ops",
        "fastcifar.ops.depthwise",
    ]


def test_importing_takes_only_what_it_needs():
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import torch\nbefore = set(sys.modules)\n"
        "import fastcifar, fastcifar.nn, fastcifar.models, fastcifar.functional, fastcifar.data\n"
        "names = ('triton', 'torchvision', 'matplotlib', 'rich', 'yaml', 'PIL', 'nvtx')\n"
        "print([n for n in names if n in sys.modules and n not in before])\n"
        "assert not torch.cuda.is_initialized()"
    )
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert end.returncode == 0, end.stderr
    assert end.stdout.strip() == "[]"


def test_no_machine_paths_in_what_is_shipped():
    tracked = [
        *FILES,
        *(ROOT / "tests").rglob("*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        ROOT / "CMakeLists.txt",
    ]
    pattern = re.compile("/" + "(work|home|root)/")
    assert not [names(path) for path in tracked if pattern.search(path.read_text(encoding="utf-8"))]
