"""The house keeps its order: who may import whom, what nobody may call, how long things get."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("fastcifar", "kernels", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 350, 50
# A kernel's address arithmetic cannot be shared with the next one's.
MAX_KERNEL = 80

# Each layer may import those below it; the ground is open to all.
LAYERS = [
    {
        "train",
        "evaluate",
        "generate",
        "export",
        "explain",
        "tune",
        "compress",
        "doctor",
        "recipe_flags",
        "command_line",
    },
    {"deploy"},
    {"training"},
    {"models", "data", "metrics"},
    {"nn", "fuse", "fusing", "folding"},
    {"functional"},
    {"ops"},
    {"reference", "reference_augment", "reference_aw_hinge", "reference_spectral", "kernels"},
]
GROUND = {"validation", "native", "philox", "profiling"}
# dispatch chooses for functional and loads what it chose; the package's own file lists names that it loads lazily.
ABOVE_ITS_PLACE = {("dispatch", "ops"), ("dispatch", "reference"), ("dispatch", "reference_aw_hinge")}
ABOVE_ITS_PLACE |= {("dispatch", "reference_augment"), ("dispatch", "reference_spectral")}
ABOVE_ITS_PLACE |= {("native", "kernels")}  # the compiled module is one of the kernels, and native finds it
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
        elif isinstance(node, ast.Call) and (dotted(node.func) or "").split(".")[-1] == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


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
    if imported == "ops":
        return f"{importer} must ask dispatch, which alone chooses among the operators"
    above, below = layer_of(importer), layer_of(imported)
    if above is None or below is None:
        unknown = importer if above is None else imported
        return f"{unknown} has no layer yet; give it one in LAYERS"
    if below < above:
        return f"{importer} must not import {imported}, which stands above it"
    return None


FORBIDDEN = [
    (r"_?pickle\.(load|loads|Pickler|Unpickler)$", "nothing is unpickled"),
    (r"(torch|joblib)\.load$", "checkpoints are safetensors and JSON"),
    (r"(eval|exec|compile|__import__)$", "no text becomes code"),
    (r"os\.(system|popen)$", "no shell"),
    (r"yaml\.(load|unsafe_load|full_load)$", "only yaml.safe_load"),
    (r".*libdevice\.fast_.*", "no approximate mathematics"),
    (r"triton\.language\.atomic_.*", "results do not depend on the order of programs"),
]


def dotted(node):
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else None
    return node.id if isinstance(node, ast.Name) else None


def meanings(tree):
    """What each imported name stands for: {"loads": "pickle.loads"} after `from pickle import loads`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def forbidden_calls(tree):
    meaning = meanings(tree)

    def full(node):
        first, dot, rest = (dotted(node) or "").partition(".")
        return meaning.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(full(base).endswith("pickle.Unpickler") for base in node.bases):
            if not any(isinstance(m, ast.FunctionDef) and m.name == "find_class" for m in node.body):
                yield f"line {node.lineno}: {node.name}: an Unpickler without an allow-list"
        if not isinstance(node, ast.Call):
            continue
        name = full(node.func)
        for pattern, reason in FORBIDDEN:
            if re.fullmatch(pattern, name):
                yield f"line {node.lineno}: {name}: {reason}"
        for keyword in node.keywords:
            if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                yield f"line {node.lineno}: shell=…: no shell"


def long_file(text):
    lines = len(text.splitlines())
    return [f"{lines} lines, at most {MAX_FILE}"] if lines > MAX_FILE else []


def long_functions(tree):
    """Functions of more than MAX_FUNCTION (kernels: MAX_KERNEL) lines, not counting signature and docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = node.end_lineno - body[0].lineno + 1
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if length > (MAX_KERNEL if is_kernel else MAX_FUNCTION):
                yield f"{node.name}: {length} lines"


def missing_docstrings(tree):
    if ast.get_docstring(tree) is None:
        yield "the module"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(("_", "test_", "Test")):
            if ast.get_docstring(node) is None:
                yield node.name
            for member in getattr(node, "body", []):
                public = isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
                # A module's class says what its forward takes and gives.
                if isinstance(node, ast.ClassDef) and public and member.name != "forward":
                    if ast.get_docstring(member) is None:
                        yield f"{node.name}.{member.name}"


def above_kernels(names):
    """Imports of kernels/ that leave it for the package above."""
    return [n for n in names if n.split(".")[0] == "fastcifar" and n.split(".")[:2] != ["fastcifar", "kernels"]]


def fast_math(text):
    return re.findall(r"use_fast_math|-ffast-math|-Ofast|funsafe-math", text)


def eager_imports(tree):
    """Modules that are imported when the file is: those outside functions."""
    bodies = [tree.body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from imports(ast.Module([node], []), "fastcifar.x", False)
            elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                bodies += [getattr(node, field, []) for field in ("body", "orelse", "handlers", "finalbody")]


def reaches_implementations(tree):
    """What dispatch must import only when it has chosen it."""
    forbidden = ("fastcifar.ops", "fastcifar.kernels", "fastcifar.reference", "triton")
    return [name for name in eager_imports(tree) if name.startswith(forbidden)]


def machine_paths(text):
    return re.findall("/" + r"(?:work|home|root)/\S*", text)


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
    problems = [*long_file(path.read_text(encoding="utf-8")), *long_functions(tree), *forbidden_calls(tree)]
    if not path.name.startswith("test_"):
        problems += [f"{name} has no docstring" for name in missing_docstrings(tree)]
    importer, in_benchmarks = part_of(module), module.split(".")[0] == "benchmarks"
    for imported in imports(tree, module, path.name == "__init__.py"):
        if imported.split(".")[0] == "kernels":
            problems.append(f"{imported}: the subpackage is called fastcifar.kernels")
        if imported.split(".")[0] in ("benchmarks", "tests") and not in_benchmarks:
            problems.append(f"{imported} is not installed")
        if imported.split(".")[0] == "fastcifar" and module != "fastcifar" and not in_benchmarks:
            problems += filter(None, [check_import(importer, part_of(imported))])
    assert not problems


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "kernels")], ids=names)
def test_kernels_know_nothing_of_the_package(path):
    assert not above_kernels(imports(tree_of(path), module_name(path), path.name == "__init__.py"))


def test_dispatch_imports_nothing_before_it_has_chosen():
    assert not reaches_implementations(tree_of(ROOT / "fastcifar" / "dispatch.py"))


def test_native_code_is_not_compiled_for_approximate_arithmetic():
    assert not fast_math((ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))


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
        ("nn", "ops"),
        ("functional", "ops"),
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
        "from triton.language.extra import libdevice\nlibdevice.fast_expf(x)",
        "from pickle import loads\nloads(b'')",
        "import pickle as p\np.Unpickler(f).load()",
        "import pickle\nclass Anything(pickle.Unpickler):\n    pass",
        "exec('1')",
    ],
    ids=[
        "pickle",
        "torch.load",
        "eval",
        "system",
        "shell",
        "yaml",
        "atomic",
        "fast_math",
        "loads",
        "Unpickler",
        "subclass",
        "exec",
    ],
)
def test_forbidden_calls_are_seen(source):
    assert list(forbidden_calls(ast.parse(source)))


def test_long_functions_and_missing_docstrings_are_seen():
    source = "def long():\n" + "    x = 1\n" * (MAX_FUNCTION + 1)
    assert list(long_functions(ast.parse(source)))
    assert not list(long_functions(ast.parse(source.replace("    x = 1\n", "", 1))))
    assert long_file("\n" * (MAX_FILE + 1)) and not long_file("\n" * MAX_FILE)
    assert list(missing_docstrings(ast.parse(source))) == ["the module", "long"]
    assert list(missing_docstrings(ast.parse("'m'\nclass A:\n    'a'\n    def b(self): pass"))) == ["A.b"]
    assert not list(missing_docstrings(ast.parse("'m'\ndef _private(): pass")))


def test_all_kinds_of_imports_are_seen():
    assert list(imports(ast.parse("from ..ops import depthwise"), "fastcifar.nn.depthwise", False)) == [
        "fastcifar.ops",
        "fastcifar.ops.depthwise",
    ]
    late = ast.parse("def f():\n    importlib.import_module('fastcifar.ops.depthwise')\n    import fastcifar.nn")
    assert set(imports(late, "fastcifar.models.x", False)) == {"fastcifar.ops.depthwise", "fastcifar.nn"}
    assert above_kernels(["triton", "fastcifar.kernels.triton", "fastcifar.reference"]) == ["fastcifar.reference"]


def test_eager_choices_and_machine_words_are_seen():
    assert reaches_implementations(ast.parse("from fastcifar import reference"))
    assert reaches_implementations(ast.parse("try:\n    import triton\nexcept ImportError:\n    triton = None"))
    assert not reaches_implementations(ast.parse("def load():\n    from fastcifar import reference"))
    assert machine_paths("see /" + "work/x") and not machine_paths("network/home")
    assert fast_math("set(CMAKE_CUDA_FLAGS --use_fast_math)")


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
        *(path for path in (ROOT / "kernels" / "native").iterdir() if path.is_file()),
        *(ROOT / "tests").rglob("*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        ROOT / "CMakeLists.txt",
    ]
    assert not [names(path) for path in tracked if machine_paths(path.read_text(encoding="utf-8"))]
