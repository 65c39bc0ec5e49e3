"""Drop-in `torch.nn` modules."""

from fastcifar.nn.aw_hinge import AdaptiveHinge, AdaptiveWeightedHinge
from fastcifar.nn.batch_norm import BatchNormAct
from fastcifar.nn.conditional import ConditionalBatchNormAct, ProjectionHead
from fastcifar.nn.depthwise import DepthwiseConvBNAct
from fastcifar.nn.spectral import spectral_norm
from fastcifar.nn.spectral_group import SpectralNormGroup

__all__ = [
    "AdaptiveHinge",
    "AdaptiveWeightedHinge",
    "BatchNormAct",
    "ConditionalBatchNormAct",
    "DepthwiseConvBNAct",
    "ProjectionHead",
    "SpectralNormGroup",
    "spectral_norm",
]
