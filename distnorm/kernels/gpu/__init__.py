"""The loops over big tensors for NVIDIA cards, in Triton, and the C-sized arithmetic between them inside of them.

Nothing here waits for the device. Importing this package does not import Triton; importing its modules does.
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
    """Whether Triton is there, wanted, and can launch; ``DISTNORM_KERNELS=aten`` does without it. Asks a CUDA device.

    At first it compiles a module of its own, for which a C compiler and Python's headers must be there.
    """
    if not wanted() or find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever a compiler, a linker or a driver has to say
        warnings.warn(f"Batch norm takes PyTorch's own kernels: Triton cannot launch any here: {error}", stacklevel=2)
        return False
    return True


def takes(x_NCL: Tensor) -> bool:
    """Whether these kernels take ``x_NCL``: on a CUDA device, of at most 32 bits per value, and not gigantic."""
    return x_NCL.is_cuda and x_NCL.dtype in DTYPES and _small(x_NCL) and available()


def _small(x_NCL: Tensor) -> bool:
    channels = x_NCL.shape[1]
    return channels < MOST_CHANNELS and x_NCL.numel() < channels * MOST_VALUES
