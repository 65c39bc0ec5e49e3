"""Drop-in `torch.nn` modules."""

from fastcifar.nn.batch_norm import BatchNormAct
from fastcifar.nn.depthwise import DepthwiseConvBNAct

__all__ = ["BatchNormAct", "DepthwiseConvBNAct"]
