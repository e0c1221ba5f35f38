"""The loops over big tensors for NVIDIA cards, in Triton, and the C-sized arithmetic between them inside of them.

Nothing here waits for the device. Importing this package does not import Triton; importing its modules does.
docs/gpu.md counts the launches and the bytes.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def available() -> bool:
    """Whether Triton is there and wanted; ``DISTNORM_KERNELS=aten`` does without it."""
    return find_spec("triton") is not None and os.environ.get("DISTNORM_KERNELS") != "aten"


def takes(x_NCL: Tensor) -> bool:
    """Whether these kernels take ``x_NCL``: on a CUDA device, of at most 32 bits per value."""
    return x_NCL.is_cuda and x_NCL.dtype in DTYPES and available()
