"""Inception features are pytorch-fid's, for any weights in any kind of file; how the weights are found."""

import hashlib
import io
import sys
import types

import numpy
import pytest
import safetensors.torch
import torch

from fastcifar import metrics
from fastcifar.data import DataError
from fastcifar.metrics import inception


def saved(table, zipped):
    stream = io.BytesIO()
    torch.save(table, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def published(table):
    """As the published file is: of torch before 1.6, and without the batches that batch norm has counted since."""
    return saved({name: tensor for name, tensor in table.items() if "num_batches" not in name}, zipped=False)


WRITERS = {
    "weights.pth": lambda table: saved(table, zipped=True),
    "like the published.pth": published,
    "weights.safetensors": safetensors.torch.save,
}


@pytest.fixture(scope="module")
def theirs():
    """pytorch-fid's module, and its network with seeded random weights, and those weights."""
    try:
        from pytorch_fid import inception as module
        from torchvision.models import Inception3
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"pytorch-fid cannot be imported: {error}")
    networks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: None)
        patch.setattr(Inception3, "load_state_dict", lambda self, table: networks.append(self))
        torch.manual_seed(0)
        network = module.InceptionV3([3]).eval()
    weights = networks[0].state_dict()
    for name, tensor in weights.items():
        if "running_" in name or ".bn." in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return network, weights


def images(count, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=numpy.uint8)


@pytest.mark.parametrize("file", WRITERS)
def test_features_are_those_of_pytorch_fid(theirs, file, tmp_path, monkeypatch):
    from pytorch_fid import inception as module

    network, weights = theirs
    fetch = module.load_state_dict_from_url
    content = WRITERS[file](weights)
    (tmp_path / file).write_bytes(content)
    extractor = metrics.InceptionFeatures(str(tmp_path / file))
    found = extractor(images(3))
    pixels = torch.from_numpy(images(3).astype(numpy.float32) / 255).permute(0, 3, 1, 2)
    expected = network(pixels)[0][:, :, 0, 0]
    assert found.shape == (3, extractor.dimension) and found.dtype == torch.float32 and expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    monkeypatch.setattr(inception, "_BATCH", 2)
    torch.testing.assert_close(extractor(images(3)), expected, rtol=1e-4, atol=1e-5)
    assert extractor.digest == hashlib.sha256(content).hexdigest() and "not the published" in extractor.name
    assert module.load_state_dict_from_url is fetch


def test_other_weights_are_refused(theirs, tmp_path):
    _, weights = theirs
    wrong = {name: tensor for name, tensor in weights.items() if not name.startswith("Mixed_7c")}
    (tmp_path / "x.pth").write_bytes(saved(wrong, zipped=True))
    with pytest.raises(DataError, match=r"x\.pth does not hold the weights of pytorch-fid.*Mixed_7c") as error:
        metrics.InceptionFeatures(str(tmp_path / "x.pth"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("dimension", [3, 200])
def test_frechet_distance_is_that_of_pytorch_fid(dimension):
    try:
        import scipy.linalg
        from pytorch_fid.fid_score import calculate_frechet_distance
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"pytorch-fid's score cannot be imported: {error}")
    try:
        scipy.linalg.sqrtm(numpy.eye(2), disp=False)
    except TypeError:
        pytest.skip(f"pytorch-fid's score does not run with scipy {scipy.__version__}, whose sqrtm has no disp")
    generator = numpy.random.default_rng(0)
    sides = []
    for offset, scale in ((0, 1), (0.3, 1.7)):
        mix = generator.standard_normal((dimension, dimension)) / dimension**0.5
        features = offset + scale * generator.standard_normal((900, dimension)) @ mix
        sides += [features.mean(0), numpy.cov(features, rowvar=False)]
    found = metrics.frechet_distance(*(torch.from_numpy(side) for side in sides))
    assert found == pytest.approx(calculate_frechet_distance(*sides), rel=1e-6)


class Network(torch.nn.Module):
    """Stands for pytorch-fid's: mean colours."""

    BLOCK_INDEX_BY_DIM = {2048: 3}

    def __init__(self, blocks):
        super().__init__()
        assert blocks == [3]
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.load_state_dict(sys.modules["pytorch_fid"].inception.load_state_dict_from_url("https://…"))

    def forward(self, x):
        return [(x * self.weight[:, None, None]).mean((2, 3), keepdim=True)]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A stand-in for pytorch-fid, and empty folders for the cache and torch hub, without a network."""

    def unreachable(*args, **options):
        raise DataError("cannot download")

    module = types.SimpleNamespace(InceptionV3=Network, load_state_dict_from_url=unreachable)
    monkeypatch.setitem(sys.modules, "pytorch_fid", types.SimpleNamespace(inception=module))
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "download", unreachable)
    content = safetensors.torch.save({"weight": torch.tensor([1.0, 2.0, 3.0])})
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(content).hexdigest())
    return types.SimpleNamespace(cache=tmp_path / "cache", hub=tmp_path / "hub" / "checkpoints", content=content)


def test_weights_come_from_a_path_the_cache_torch_hub_or_the_net(places, monkeypatch, tmp_path):
    asked = []

    def download(url, target, **options):
        asked.append((url, target, options))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(places.content)
        return target

    def extractor(*weights):
        made = metrics.InceptionFeatures(*weights)
        assert made(numpy.full((2, 8, 8, 3), 51, dtype=numpy.uint8)).tolist() == [pytest.approx([0.2, 0.4, 0.6])] * 2
        return made

    (tmp_path / "given").write_bytes(places.content)
    assert extractor(str(tmp_path / "given")).name == "inception"
    places.hub.mkdir(parents=True)
    (places.hub / inception.FILE).write_bytes(places.content)
    extractor()
    (places.hub / inception.FILE).unlink()
    monkeypatch.setattr(inception, "download", download)
    assert extractor().digest == inception.SHA256
    ((url, target, options),) = asked
    assert url.startswith("https://") and url.endswith("/pt_inception-2015-12-05-6726825d.pth")
    assert target == places.cache / inception.FILE
    assert options["sha256"] == inception.SHA256 and options["size_limit"] == 100_000_000


def test_the_published_file_is_what_is_asked_for():
    assert len(inception.SHA256) == 64 and inception.FILE.endswith(f"-{inception.SHA256[:8]}.pth")


def test_absent_weights_are_one_clear_line(places):
    words = rf"the inception features need {inception.FILE}; cannot download, or give its path"
    with pytest.raises(DataError, match=words):
        metrics.InceptionFeatures()
    with pytest.raises(DataError, match=f"there is no file nowhere; give {inception.FILE} from https://"):
        metrics.InceptionFeatures("nowhere")


def test_a_pickle_of_something_else_is_not_opened(places, tmp_path):
    (tmp_path / "x.pth").write_bytes(saved({"weight": numpy.zeros(3)}, zipped=True))
    with pytest.raises(DataError, match=r"x\.pth: refused, not a file of named tensors \(the name numpy"):
        metrics.InceptionFeatures(str(tmp_path / "x.pth"))


def test_without_pytorch_fid(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(ValueError, match=r"pip install 'fastcifar\[metrics\]'"):
        metrics.InceptionFeatures()
