"""Where tests of the GPU kernels run: in Triton's interpreter on the CPU, or natively with ``pytest -m gpu``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from distnorm.kernels.gpu import cosums, moments, tiles
from distnorm.kernels.gpu.gpu_pass import GpuPass
from distnorm.methods import ChannelAffine
from distnorm.types import Affine

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
CUTS = ["whole", "cut"]


def skip_without(device: str) -> None:
    """Skip the test where ``device`` is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter is on; 'pytest -m gpu' turns it off")


def run_on(device: str) -> Iterator[str]:
    """The device, with its layers on the kernels under test."""
    skip_without(device)
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr("distnorm.autograd.normalize.new_pass", gpu_pass)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions would differ more than norms do
        torch.use_deterministic_algorithms(device == "cpu")  # memory that nothing was written to holds NaN then
        yield device
        torch.use_deterministic_algorithms(False)


def cut_small(cut: str) -> Iterator[str]:
    """Tiles as they are, or so small that a program has several and a channel several programs, at any shape."""
    with pytest.MonkeyPatch.context() as patch:
        if cut == "cut":
            patch.setattr(tiles, "TILE", 16)
            patch.setattr(tiles, "COLUMNS", 4)
            patch.setattr(tiles, "PROGRAMS", 3)
            for module in (moments, cosums):
                patch.setattr(module, "MERGE_ROWS", 2)
                patch.setattr(module, "MERGE_COLUMNS", 2)
        yield cut


def gpu_pass(method: ChannelAffine, x: torch.Tensor, affine: Affine) -> GpuPass:
    formula = method.formula(affine)
    assert formula is not None
    return GpuPass(formula, affine.eps)
