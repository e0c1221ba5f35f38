"""Which statistics, which transform: the method axis of the grid."""

from distnorm.methods.base import ChannelAffine, Method
from distnorm.methods.batch_norm import BatchNorm
from distnorm.methods.rms import RMS

__all__ = ["RMS", "BatchNorm", "ChannelAffine", "Method"]
