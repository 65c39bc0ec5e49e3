"""Wheels and source trees: compiled, pure, with a broken compiler, and beside each other."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("scikit_build_core", "nanobind", "pip")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(tool) is None for tool in TOOLS)
        or not all(
            shutil.which(tool, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
            for tool in ("cmake", "ninja")
        ),
        reason="building a wheel needs pip, scikit-build-core, nanobind, cmake and ninja",
    ),
]
NAME = "_native" + sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a user would build from, without build folders."""
    target = tmp_path_factory.mktemp("source") / "fastcifar-source"
    skipped = shutil.ignore_patterns("build", ".git", "__pycache__", ".*_cache", "*.so")
    for name in ("fastcifar", "kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=skipped)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def build(source, folder, **environment):
    """Builds a wheel, for speed without CUDA, optimisation and all instruction sets, and unpacks it as pip would."""
    quick = "-DCMAKE_CUDA_COMPILER=NOTFOUND -DCMAKE_CXX_FLAGS_RELEASE=-O0 -DFASTCIFAR_X86=OFF"
    settings = {**os.environ, "CMAKE_ARGS": quick, **environment}
    settings["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), settings["PATH"]])
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    end = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert end.returncode == 0, end.stdout + end.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        return folder / "site", archive.namelist()


@pytest.fixture(scope="module")
def compiled(source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def pure(source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("pure"), FASTCIFAR_PURE_PYTHON="1")


def run(site, code, cwd):
    """Runs code as a fresh interpreter would that has the wheel installed; the folder it runs in comes first."""
    # An editable install of the tree under test, if any, must not answer for the wheel.
    start = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
        f"sys.path.insert(0, {str(site)!r}); sys.path.insert(0, ''); "
    )
    end = subprocess.run([sys.executable, "-c", start + code], cwd=cwd, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    return end.stdout.strip()


REPORT = "import fastcifar, fastcifar.native as n; print(fastcifar.__file__); print(n.why_not()); print(n.build_info())"
STEP = (
    "import torch, fastcifar.models as m; torch.manual_seed(0); net = m.create_model('ds_resnet', 10, width=0.25); "
    "net(torch.randn(2, 3, 16, 16)).sum().backward(); print(sum(p.grad is not None for p in net.parameters()))"
)


def test_the_wheel_holds_what_it_should(compiled):
    names = compiled[1]
    package = {name for name in names if name.startswith("fastcifar/")}
    assert {f"fastcifar/kernels/{NAME}", "fastcifar/py.typed", "fastcifar/kernels/__init__.py"} <= package
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", "CMakeLists.txt"))]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastcifar"}


def test_an_installed_wheel_has_its_compiled_module(compiled, tmp_path):
    code = "import fastcifar.native as n, fastcifar.kernels as k; print(k.__file__, n.module().__file__)"
    kernels = run(compiled[0], code, tmp_path)
    place, why_not, info = run(compiled[0], REPORT, tmp_path).splitlines()
    assert place.startswith(str(compiled[0])) and why_not == "None" and "compiler" in info
    assert all(file.startswith(str(compiled[0] / "fastcifar" / "kernels")) for file in kernels.split())
    assert int(run(compiled[0], STEP, tmp_path)) > 10


def test_a_pure_wheel_says_so_and_works(pure, tmp_path):
    assert not [name for name in pure[1] if name.endswith((".so", ".pyd", ".dylib"))]
    place, why_not, info = run(pure[0], REPORT, tmp_path).splitlines()
    assert place.startswith(str(pure[0])) and info == "{}"
    assert "without its compiled module" in why_not and "install a compiler" in why_not
    assert int(run(pure[0], STEP, tmp_path)) > 10


def test_a_broken_compiler_gives_a_pure_wheel(source, tmp_path):
    shutil.rmtree(source / "build", ignore_errors=True)
    site, names = build(source, tmp_path, CXX=shutil.which("false"), CC=shutil.which("false"))
    assert not [name for name in names if name.endswith(".so")]
    assert "without its compiled module" in run(site, REPORT, tmp_path).splitlines()[1]


def test_the_source_tree_beside_a_wheel_is_clear(compiled, source):
    place, why_not, _ = run(compiled[0], REPORT, source).splitlines()
    assert place.startswith(str(source))
    assert f"this is the source tree {source}" in why_not and f"pip install -e {source}" in why_not
    assert str(compiled[0] / "fastcifar") in why_not
    assert int(run(compiled[0], STEP, source)) > 10
