"""LPIPS against its published values and its definition, and nearest neighbours against brute force."""

import numpy
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from fastcifar.data import DataError
from fastcifar.metrics import Lpips, nearest_neighbours, neighbour_rows, perceptual

FIRES = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128),
         9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}  # fmt: skip
COMPARED = {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}


def random_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"features.0": (64, 3, 3, 3)}
    for index, (channels, squeezed, expanded) in FIRES.items():
        shapes[f"features.{index}.squeeze"] = (squeezed, channels, 1, 1)
        shapes[f"features.{index}.expand1x1"] = (expanded, squeezed, 1, 1)
        shapes[f"features.{index}.expand3x3"] = (expanded, squeezed, 3, 3)
    table = {}
    for name, shape in shapes.items():
        table[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / numpy.prod(shape[1:])) ** 0.5
        table[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    for number, channels in enumerate(COMPARED.values()):
        table[f"lin{number}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator) / channels
    return table


def by_definition(table, a, b):
    """LPIPS [N] of images [N, 3, H, W] in [−1, 1], in float64."""
    table = {name: tensor.double() for name, tensor in table.items()}

    def convolve(x, name, **options):
        return F.relu(F.conv2d(x, table[f"{name}.weight"], table[f"{name}.bias"], **options))

    def features(x):
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).double().view(2, 3, 1, 1)
        x = convolve((x.double() - shift) / scale, "features.0", stride=2)
        yield x
        for index in range(2, 13):
            if index in FIRES:
                x = convolve(x, f"features.{index}.squeeze")
                wide = convolve(x, f"features.{index}.expand3x3", padding=1)
                x = torch.cat([convolve(x, f"features.{index}.expand1x1"), wide], 1)
            else:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            if index in COMPARED:
                yield x

    total = 0
    for number, (one, other) in enumerate(zip(features(a), features(b), strict=True)):
        one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (one, other))
        weighted = F.conv2d((one - other).square(), table[f"lin{number}.model.1.weight"])
        total = total + weighted.mean((1, 2, 3))
    return total


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "weights.safetensors"
    safetensors.torch.save_file(random_weights(), path)
    return str(path)


@pytest.fixture(scope="module")
def lpips(weights_file):
    return Lpips(weights_file)


def scaled(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def images(count, seed=0, size=32):
    smooth = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(smooth, (size, size), mode="bilinear") * 255
    return pixels.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


def test_published_values(lpips_weights):
    """Those that torchmetrics documents: two of one drawing, and the mean of another."""
    lpips = Lpips(str(lpips_weights))
    generator = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    assert lpips(a, b).tolist() == pytest.approx([0.1024, 0.0938], abs=5e-5)
    generator = torch.Generator().manual_seed(123)
    a, b = (torch.rand(10, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    assert lpips(a, b).mean().item() == pytest.approx(0.1008, abs=5e-5)


@pytest.mark.parametrize("size", [(32, 32), (17, 17), (40, 53)], ids=str)
def test_the_distance_is_the_definition(lpips, size):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(3, 3, *size, generator=generator) * 2 - 1 for _ in range(2))
    assert lpips(a, b).tolist() == pytest.approx(by_definition(random_weights(), a, b).tolist(), rel=1e-5)
    assert lpips(a, a).tolist() == [0, 0, 0]


def test_the_features_are_torchvisions(lpips):
    try:
        from torchvision.models import squeezenet1_1
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    theirs = squeezenet1_1(weights=None).features
    prefix = "features."
    theirs.load_state_dict({n[len(prefix) :]: t for n, t in random_weights().items() if n.startswith(prefix)})
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        torch.testing.assert_close(lpips._features(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [(2000, 500, 50), (3, 7, 2)], ids=["one block", "many blocks"])
@pytest.mark.parametrize("count", [1, 3, 23])
def test_neighbours_are_those_of_brute_force(lpips, monkeypatch, blocks, count):
    for name, size in zip(("_GENERATED", "_REAL", "_EXACT"), blocks, strict=True):
        monkeypatch.setattr(perceptual, name, size)
    generated, real = images(8, seed=1), images(23)
    table, width = random_weights(), len(real)
    a, b = scaled(generated).repeat_interleave(width, 0), scaled(real).repeat(len(generated), 1, 1, 1)
    expected = by_definition(table, a, b).view(-1, width).sort(1)
    found = nearest_neighbours(lpips, generated, real, count=count)
    assert torch.equal(found.indices, expected.indices[:, :count])
    torch.testing.assert_close(found.distances.double(), expected.values[:, :count], rtol=1e-5, atol=0)


def test_copies_are_found_and_their_small_distances_are_exact(lpips):
    real = images(60)
    generated = real[[7, 41, 13]].copy()
    generated[1, 5, 5, 1] ^= 1
    generated[2] = real[12]
    found = nearest_neighbours(lpips, generated, real, count=2)
    assert found.indices[:, 0].tolist() == [7, 41, 12]
    # Batches of other sizes round otherwise.
    assert found.distances[[0, 2], 0].max() < 1e-12
    expected = by_definition(random_weights(), scaled(generated[1:2]), scaled(real[41:42])).item()
    # Far below what is left of it in |a|² + |b|² − 2⟨a, b⟩.
    assert 0 < expected < 1e-4 and found.distances[1, 0].item() == pytest.approx(expected, rel=1e-3)


def test_rows_show_each_image_before_its_neighbours():
    generated, real = images(2, seed=1), images(5)
    rows = neighbour_rows(generated, real, torch.tensor([[4, 0], [2, 3]]))
    expected = [generated[0], real[4], real[0], generated[1], real[2], real[3]]
    assert numpy.array_equal(rows, numpy.stack(expected))


def test_weights_are_found_in_the_cache(tmp_path, monkeypatch, weights_file):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"needs its weights, and there is no file .*lpips/squeeze-v0\.1\.safetensors"):
        Lpips()
    target = tmp_path / "lpips" / "squeeze-v0.1.safetensors"
    target.parent.mkdir()
    target.symlink_to(weights_file)
    assert Lpips().digest == Lpips(weights_file).digest and len(Lpips().digest) == 64


def changed(**changes):
    return {name: tensor for name, tensor in {**random_weights(), **changes}.items() if tensor is not None}


WRONG = {
    "a tensor too few": (changed(**{"features.3.squeeze.bias": None}), r"features\.3\.squeeze\.bias is missing"),
    "a tensor too many": (changed(fc=torch.zeros(3)), r"fc is \[3\], must be absent"),
    "another shape": (changed(**{"lin1.model.1.weight": torch.ones(1, 64, 1, 1)}), r"must be \[1, 128, 1, 1\]"),
    "negative": (changed(**{"lin6.model.1.weight": -torch.ones(1, 512, 1, 1)}), "negative"),
}


@pytest.mark.parametrize(("table", "words"), WRONG.values(), ids=WRONG.keys())
def test_other_weights_are_refused(table, words, tmp_path):
    safetensors.torch.save_file(table, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=rf"x\.safetensors does not hold LPIPS.*{words}"):
        Lpips(str(tmp_path / "x.safetensors"))


BAD = {
    "float images": (lambda: (images(2).astype("float32"), images(3), 1), "generated must be uint8"),
    "another size": (lambda: (images(2), images(3, size=40), 1), r"real must be .* got uint8 \[3, 40, 40, 3\]"),
    "too small": (lambda: (images(2, size=16), images(3, size=16), 1), r"at least 17 × 17, got \[2, 3, 16, 16\]"),
    "more than there are": (lambda: (images(2), images(3), 4), "from 1 to 3 real images, got 4"),
    "none": (lambda: (images(2), images(3), 0), "from 1 to 3 real images, got 0"),
    "none generated": (lambda: (images(0), images(3), 1), "at least one"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_bad_images_are_refused(lpips, arguments, words):
    generated, real, count = arguments()
    with pytest.raises(ValueError, match=words):
        nearest_neighbours(lpips, generated, real, count=count)
