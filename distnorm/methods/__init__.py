"""Methods: which statistics are computed, and how they transform the input."""

from distnorm.methods.base import ChannelAffine, Declared, Layer, Method, Share, Shared
from distnorm.methods.batch_norm import BatchNorm
from distnorm.methods.gbn import L1, Range, Semideviation, WorstCase
from distnorm.methods.iebn import IEBN
from distnorm.methods.mixture import MixtureNorm
from distnorm.methods.per_sample import GroupNorm, InstanceNorm, LayerNorm
from distnorm.methods.quantile import MAD, SQD
from distnorm.methods.rms import RMS

__all__ = [
    "IEBN",
    "L1",
    "MAD",
    "RMS",
    "SQD",
    "BatchNorm",
    "ChannelAffine",
    "Declared",
    "GroupNorm",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "Method",
    "MixtureNorm",
    "Range",
    "Semideviation",
    "Share",
    "Shared",
    "WorstCase",
]
