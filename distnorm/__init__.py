"""Communication-efficient synchronized normalization for distributed training in PyTorch.

>>> model = distnorm.convert(model, "sync_bn")  # doctest: +SKIP
"""

import distnorm.compat.torch_version  # noqa: F401, first: imports below may fail with a torch that is too old

# isort: split
from distnorm import methods, nn, policies, recipes
from distnorm.attach import attach, end_step, load_state_dict, state_dict, sync_running_stats
from distnorm.convert import convert, register_converter, revert
from distnorm.diagnostics import Ledger, stats
from distnorm.fold import fold
from distnorm.layers.module import (
    DistBatchNorm1d,
    DistBatchNorm2d,
    DistBatchNorm3d,
    DistNorm,
    DistNorm1d,
    DistNorm2d,
    DistNorm3d,
)
from distnorm.preconditioning import Preconditioner, precondition
from distnorm.recipe import Recipe

__all__ = [
    "DistBatchNorm1d",
    "DistBatchNorm2d",
    "DistBatchNorm3d",
    "DistNorm",
    "DistNorm1d",
    "DistNorm2d",
    "DistNorm3d",
    "Ledger",
    "Preconditioner",
    "Recipe",
    "attach",
    "convert",
    "end_step",
    "fold",
    "load_state_dict",
    "methods",
    "nn",
    "policies",
    "precondition",
    "recipes",
    "register_converter",
    "revert",
    "state_dict",
    "stats",
    "sync_running_stats",
]
