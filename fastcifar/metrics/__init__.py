"""How near generated images are to real ones, in the features of a named network."""

from fastcifar.metrics.comparison import METRICS, Reference, compare, selection
from fastcifar.metrics.extractors import ClassifierFeatures
from fastcifar.metrics.frechet import FeatureStatistics, frechet_distance
from fastcifar.metrics.inception import InceptionFeatures
from fastcifar.metrics.neighbours import NEIGHBOURS, kernel_distance, precision_recall_density_coverage
from fastcifar.metrics.perceptual import Lpips, Neighbours, nearest_neighbours, neighbour_rows

__all__ = [
    "METRICS",
    "NEIGHBOURS",
    "ClassifierFeatures",
    "FeatureStatistics",
    "InceptionFeatures",
    "Lpips",
    "Neighbours",
    "Reference",
    "compare",
    "frechet_distance",
    "kernel_distance",
    "nearest_neighbours",
    "neighbour_rows",
    "precision_recall_density_coverage",
    "selection",
]
