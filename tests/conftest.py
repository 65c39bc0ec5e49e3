"""Settings of all tests."""

import os
import pathlib

import torch

if not torch.cuda.is_available():
    # The Triton interpreter is chosen when the kernels are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory):
    """Tests neither read nor write a user's cache."""
    os.environ["FASTCIFAR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def cifar_folder() -> pathlib.Path:
    """The folder that holds the real CIFAR sets."""
    folder = os.environ.get("FASTCIFAR_DATA")
    if not folder:
        pytest.skip("needs the real CIFAR images: set FASTCIFAR_DATA to the folder that holds cifar-100-python/")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def launcher():
    """Starts processes that have everything imported."""
    from benchmarks import kills

    return kills.Launcher()


@pytest.fixture(scope="session")
def lpips_weights() -> pathlib.Path:
    """The file of LPIPS's published weights."""
    path = pathlib.Path(os.environ.get("FASTCIFAR_LPIPS", ""))
    if not path.is_file():
        pytest.skip("needs LPIPS's published weights: set FASTCIFAR_LPIPS to squeeze-v0.1.safetensors")
    return path


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing the curves takes longer than a tiny run."""
    monkeypatch.setattr("fastcifar.train.draw_curves", lambda *arguments: None)


@pytest.fixture
def one_thread():
    """For layers this small, several threads wait more for each other than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """GPU tests are skipped, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
