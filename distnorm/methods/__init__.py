"""Methods: which statistics are computed, and how they transform the input."""

from distnorm.methods.base import ChannelAffine, Declared, Layer, Method, Share, Shared
from distnorm.methods.batch_norm import BatchNorm
from distnorm.methods.rms import RMS

__all__ = ["RMS", "BatchNorm", "ChannelAffine", "Declared", "Layer", "Method", "Share", "Shared"]
