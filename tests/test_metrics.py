"""Metrics of generated images against direct definitions."""

import numpy
import pytest
import torch

from fastcifar import metrics
from fastcifar.metrics import (
    FeatureStatistics,
    comparison,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from fastcifar.models import create_model


def features(count, dimension, seed=0, offset=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    return offset + scale * torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mix


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_statistics_are_those_of_the_whole(offset):
    whole = features(500, 7, offset=offset)
    statistics = FeatureStatistics(7)
    for part in whole.split([1, 99, 0, 250, 150]):
        statistics.update(part)
    assert statistics.count == 500
    numpy.testing.assert_allclose(statistics.mean, whole.numpy().mean(0), rtol=1e-12, atol=1e-9)
    numpy.testing.assert_allclose(statistics.covariance, numpy.cov(whole.numpy(), rowvar=False), rtol=1e-7, atol=1e-9)


def published_formula(mean_1, covariance_1, mean_2, covariance_2):
    """As pytorch-fid has it: the trace of the matrix root of S₁S₂, here by its eigenvalues."""
    eigenvalues = numpy.linalg.eigvals(covariance_1 @ covariance_2)
    root = numpy.sqrt(eigenvalues.astype(complex)).sum().real
    difference = mean_1 - mean_2
    return difference @ difference + numpy.trace(covariance_1) + numpy.trace(covariance_2) - 2 * root


@pytest.mark.parametrize("dimension", [1, 5, 64])
def test_frechet_distance_is_the_published_formula(dimension):
    sides = []
    for seed, offset, scale in ((0, 0.0, 1.0), (1, 0.3, 1.7)):
        statistics = FeatureStatistics(dimension)
        statistics.update(features(400, dimension, seed, offset, scale))
        sides += [statistics.mean, statistics.covariance]
    expected = published_formula(*(tensor.numpy() for tensor in sides))
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*sides[2:], *sides[:2]) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_distributions():
    eye = torch.eye(3, dtype=torch.float64)
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    # |μ|² + Σ(1 − 3)² for standard deviations 1 and 3
    assert frechet_distance(zero, eye, one, 9 * eye) == pytest.approx(3 + 3 * 4)
    # Singular: nothing in two of three directions.
    flat = torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64))
    assert frechet_distance(zero, flat, zero, eye) == pytest.approx((2 - 1) ** 2 + 2)
    assert frechet_distance(zero, eye, zero, flat) == pytest.approx((2 - 1) ** 2 + 2)


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = features(30, 4, 0), features(30, 4, 1, offset=0.5)

    def kernel(a, b):
        return (float(a @ b) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(30) for j in range(30)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (30 * 29)
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 900
    mean, deviation = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(expected, rel=1e-9) and deviation < 1e-9 * abs(expected) + 1e-12
    halves = features(800, 4, 0).split(400)
    assert abs(kernel_distance(*halves, size=200)[0]) < expected / 20


def test_precision_recall_density_coverage_by_definition():
    real, generated = features(25, 3, 0), features(31, 3, 0, offset=0.4)

    def radius(points, i, k=5):
        return sorted(float((points[i] - p).norm()) for p in points)[k]

    def distance(i, j):
        return float((real[i] - generated[j]).norm())

    balls = [[distance(i, j) <= radius(real, i) for j in range(31)] for i in range(25)]
    expected = {
        "precision": numpy.mean([any(balls[i][j] for i in range(25)) for j in range(31)]),
        "recall": numpy.mean([any(distance(i, j) <= radius(generated, j) for j in range(31)) for i in range(25)]),
        "density": numpy.sum(balls) / (5 * 31),
        "coverage": numpy.mean([any(row) for row in balls]),
    }
    assert precision_recall_density_coverage(real, generated) == pytest.approx(expected)
    same = precision_recall_density_coverage(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_classifier_features_are_what_the_last_layer_sees():
    torch.manual_seed(0)
    network = create_model("ds_resnet", 10, width=0.25).eval()
    images = numpy.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=numpy.uint8)
    extractor = metrics.ClassifierFeatures(network, (0.5,) * 3, (0.2,) * 3, name="ds_resnet", digest="")
    found = extractor(images)
    assert found.shape == (6, extractor.dimension)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.2
    with torch.no_grad():
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        torch.testing.assert_close(last(found), network(pixels))


class Pixels:
    """Mean colours as features."""

    dimension, device = 3, torch.device("cpu")

    def __call__(self, images):
        return torch.from_numpy(images.astype(numpy.float32).mean((1, 2)))


def image_batches(count, low, high, seed=0):
    generator = numpy.random.default_rng(seed)
    for begin in range(0, count, 50):
        tints = generator.integers(low, high, (min(50, count - begin), 1, 1, 3))
        noise = generator.integers(-9, 10, (min(50, count - begin), 8, 8, 3))
        yield (tints + noise).clip(0, 255).astype(numpy.uint8)


def test_compare_orders_what_is_near_and_far():
    reference = metrics.Reference(Pixels(), image_batches(300, 50, 200))
    near = metrics.compare(Pixels(), reference, image_batches(300, 50, 200, seed=1), ("fd", "kid", "prdc"))
    far = metrics.compare(Pixels(), reference, image_batches(300, 150, 250, seed=1), ("fd", "kid", "prdc"))
    assert set(near) == {"fd", "kid", "kid_deviation", "precision", "recall", "density", "coverage"}
    assert near["fd"] < far["fd"] / 10 and near["kid"] < far["kid"] and near["coverage"] > far["coverage"]
    with pytest.raises(ValueError, match="unknown metric 'is'"):
        metrics.compare(Pixels(), reference, image_batches(50, 50, 200), ("is",))


def silent(extractor):
    """The same network, which must not be asked for features."""

    class Silent:
        dimension, device = extractor.dimension, extractor.device
        digest, settings = extractor.digest, extractor.settings

    return Silent()


def test_a_reference_is_read_from_its_cache(tmp_path):
    images = numpy.concatenate(list(image_batches(300, 50, 200)))
    extractor = Pixels()
    extractor.digest, extractor.settings = "0123456789abcdef", "mean 0.5"
    made = metrics.Reference.of_images(extractor, images, tmp_path)
    (place,) = tmp_path.iterdir()
    assert extractor.digest in place.name
    read = metrics.Reference.of_images(silent(extractor), images, tmp_path)
    for one, other in ((made.statistics.covariance, read.statistics.covariance), (made.features, read.features)):
        assert torch.equal(one, other)
    # Other images and other networks have references of their own; a damaged file is made anew.
    metrics.Reference.of_images(extractor, images[1:], tmp_path)
    extractor.digest = "f" * 16
    metrics.Reference.of_images(extractor, images, tmp_path)
    extractor.digest, extractor.settings = "0123456789abcdef", "mean 0.4"
    metrics.Reference.of_images(extractor, images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    extractor.settings = "mean 0.5"
    place.write_bytes(place.read_bytes()[:-9])
    assert torch.equal(metrics.Reference.of_images(extractor, images, tmp_path).features, made.features)
    assert len(place.read_bytes()) > 1000


def test_the_distance_of_few_real_images_is_larger():
    reference = metrics.Reference(Pixels(), image_batches(800, 50, 200))
    assert reference.floor(10) > reference.floor(400) > 0


BAD = [
    (lambda: FeatureStatistics(3).update(torch.zeros(2, 4)), r"features must be \[n, 3\], got \(2, 4\)"),
    (lambda: FeatureStatistics(3).mean, "at least 1 images, has seen 0"),
    (lambda: frechet_distance(*[torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(2)]), r"mean_2 must be \[3\]"),
    (lambda: kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3)), "needs two features of each, got 1 and 5"),
    (lambda: precision_recall_density_coverage(torch.zeros(5, 3), torch.zeros(9, 3)), "more than 5 features"),
    (lambda: metrics.ClassifierFeatures(torch.nn.ReLU(), (0,), (1,), name="x", digest=""), "x has no linear layer"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_few_of_many_images_are_a_fair_sample():
    assert metrics.selection(10_000, 10_000).tolist() == list(range(10_000))
    order = metrics.selection(20_000, 20_000)
    assert sorted(order) == list(range(20_000)) and 4_500 < (order[:10_000] < 10_000).sum() < 5_500
    some = metrics.selection(400, 100)
    assert len(set(some)) == 100 and some.max() > 300 and (some == metrics.selection(400, 100)).all()


def test_a_reference_of_a_sorted_folder_keeps_images_of_all_its_classes(monkeypatch):
    monkeypatch.setattr(comparison, "_KEPT", 20)
    images = numpy.repeat(numpy.arange(60, dtype=numpy.uint8), 8 * 8 * 3).reshape(60, 8, 8, 3)
    kept = metrics.Reference.of_images(Pixels(), images).features
    assert len(kept) == 20 and kept.max() > 40
