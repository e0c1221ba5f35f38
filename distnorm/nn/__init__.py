"""Layers for new models: SyncBatchNorm on any device, and norms whose affine part is an input."""

from distnorm.nn.adain import AdaIN
from distnorm.nn.conditional import ConditionalBatchNorm, ConditionalInstanceNorm
from distnorm.nn.spade import SPADE
from distnorm.nn.sync_batch_norm import SyncBatchNorm

__all__ = ["SPADE", "AdaIN", "ConditionalBatchNorm", "ConditionalInstanceNorm", "SyncBatchNorm"]
