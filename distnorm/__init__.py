"""Communication-efficient synchronized normalization for distributed training in PyTorch.

>>> model = distnorm.convert(model, "sync_bn")  # doctest: +SKIP
"""

from distnorm import methods, nn, policies, recipes
from distnorm.convert import attach, convert, register_converter, revert, sync_running_stats
from distnorm.diagnostics import Ledger
from distnorm.grid import Recipe
from distnorm.module import DistNorm, DistNorm1d, DistNorm2d, DistNorm3d

__all__ = [
    "DistNorm",
    "DistNorm1d",
    "DistNorm2d",
    "DistNorm3d",
    "Ledger",
    "Recipe",
    "attach",
    "convert",
    "methods",
    "nn",
    "policies",
    "recipes",
    "register_converter",
    "revert",
    "sync_running_stats",
]
