"""The loops over activations in Triton, for NVIDIA GPUs; the C-sized arithmetic between them runs in the same kernels.

The host never waits for the device here. Importing this package does not import Triton; importing its modules does.
docs/gpu.md counts the launches and the bytes.
"""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from distnorm.kernels.native import wanted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MOST_CHANNELS, MOST_VALUES = 2**20, 2**31 - 2**16
"""Channels, and values in each, whose positions within a tile and within a channel are 32-bit numbers."""


@cache
def available() -> bool:
    """Return whether Triton is installed, enabled (``DISTNORM_KERNELS``) and can launch. Needs a CUDA device.

    Triton compiles a module on first use, which needs a C compiler and Python's headers.
    """
    if not wanted() or find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # any error of a compiler, a linker or a driver
        warnings.warn(f"distnorm: using PyTorch's kernels, since Triton cannot launch its own: {error}", stacklevel=2)
        return False
    return True


def takes(x_NCL: Tensor) -> bool:
    """Return whether these kernels accept ``x_NCL``: on a CUDA device, at most 32 bits per value, and not too large."""
    return x_NCL.is_cuda and x_NCL.dtype in DTYPES and _small(x_NCL) and available()


def _small(x_NCL: Tensor) -> bool:
    channels = x_NCL.shape[1]
    return channels < MOST_CHANNELS and x_NCL.numel() < channels * MOST_VALUES
