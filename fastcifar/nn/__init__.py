"""Drop-in `torch.nn` modules."""

from fastcifar.nn.aw_hinge import AdaptiveHinge, AdaptiveWeightedHinge
from fastcifar.nn.batch_norm import BatchNormAct
from fastcifar.nn.depthwise import DepthwiseConvBNAct

__all__ = ["AdaptiveHinge", "AdaptiveWeightedHinge", "BatchNormAct", "DepthwiseConvBNAct"]
