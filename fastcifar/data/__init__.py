"""Images: safe readers, downloads, the synthetic set, and the resident loader that augments them."""

from fastcifar.data.dataset import DataError, ImageDataset
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
    "load_dataset",
    "locate_dataset",
]
