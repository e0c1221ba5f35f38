"""Methods: which statistics are computed, and how they transform the input."""

from distnorm.methods.base import ChannelAffine, Method
from distnorm.methods.batch_norm import BatchNorm
from distnorm.methods.rms import RMS

__all__ = ["RMS", "BatchNorm", "ChannelAffine", "Method"]
