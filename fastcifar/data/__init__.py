"""Images: safe readers, downloads, the synthetic set, and the resident loader that augments them."""

from fastcifar.data.dataset import DataError, ImageDataset
from fastcifar.data.holdout import hold_out
from fastcifar.data.load import load_dataset, locate_dataset
from fastcifar.data.resident import Augmentation, Batch, Plan, ResidentLoader, evaluation_batches

__all__ = [
    "Augmentation",
    "Batch",
    "Plan",
    "DataError",
    "ImageDataset",
    "ResidentLoader",
    "evaluation_batches",
    "hold_out",
    "load_dataset",
    "locate_dataset",
]
