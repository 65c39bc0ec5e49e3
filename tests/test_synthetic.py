"""The synthetic set: the same for the same seed, balanced, not linear, learnable."""

import hashlib

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.data import ResidentLoader, evaluation_batches
from fastcifar.data.synthetic import synthetic


def digest(images):
    return hashlib.sha256(images.tobytes()).hexdigest()


def test_deterministic_by_seed():
    one, two, other = synthetic(300, 100), synthetic(300, 100), synthetic(300, 100, seed=1)
    assert digest(one.train_images) == digest(two.train_images) != digest(other.train_images)
    assert (one.train_labels == two.train_labels).all()
    assert digest(one.train_images[:100]) != digest(one.test_images)


def test_balanced_and_complete():
    made = synthetic(1_000, 200)
    assert (numpy.bincount(made.train_labels) == 10).all() and (numpy.bincount(made.test_labels) == 2).all()
    assert made.num_classes == 100 and len(set(made.class_names)) == 100 and made.synthetic and made.notices


def trained_accuracy(model, made, steps, rate):
    options = {"mean": made.mean, "std": made.std}
    loader = ResidentLoader(made.train_images, made.train_labels, batch_size=100, num_classes=100, **options)
    optimiser = torch.optim.Adam(model.parameters(), rate, fused=True)
    for step in range(steps):
        batch = loader.batch(step)
        optimiser.zero_grad()
        F.cross_entropy(model(batch.images), batch.labels).backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        batches = evaluation_batches(made.test_images, made.test_labels, batch_size=500, **options)
        correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    return 100 * correct / len(made.test_labels)


def test_a_linear_classifier_fails_where_a_small_network_learns():
    torch.manual_seed(0)
    made = synthetic(5_000, 1_000)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 100))
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 100))
    assert trained_accuracy(linear, made, 200, 1e-3) < 6
    assert trained_accuracy(network, made, 200, 3e-3) > 20
