"""Compiles the kernels for an H100 or H200 by real calls of the operators, whose launches end before the card's turn.

Prints what came out. Run it without the interpreter; no card is needed.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from distnorm.kernels.activations import NONE, NUMBERS, RECTIFIED
from distnorm.kernels.gpu import apply, combine, cosums, moments
from distnorm.kernels.gpu.cosums import BY_INPUT, BY_OUTPUT, UNMASKED

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VECTORS, SPILLS = re.compile(r"ld\.global\.v4\.b32"), re.compile(rb"STACK:[1-9]|LOCAL:[1-9]")
EPS = 1e-5

# Aligned as ResNet's are, with one program per channel and several; with sizes that become the constant 1; odd; small.
SHAPES = [(8, 64, 16, 16), (64, 16, 32, 32), (8, 1, 4, 4), (33, 7, 7, 7), (2, 1)]


class Absent:
    """A driver that names a card and has none."""

    def get_current_target(self) -> GPUTarget:
        """An H200."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def compile_launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    """In the place of ``tiles.launch``: all of a launch but the launch."""
    built = kernel.warmup(*arguments, grid=grid, num_warps=4)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, check=True).stdout
    x = arguments[0]
    aligned = x.dim() > 1 and not any(size % 16 for size in (x.shape[1], x[0, 0].numel()))
    loads = "vectors" if VECTORS.search(built.asm["ptx"]) else "scalars"
    print(kernel.__name__, "aligned" if aligned else "odd", loads, "spills" if SPILLS.search(usage) else "")


def call(x: Tensor, *, kinds: int, mask: int, activation: int) -> None:
    """All operators; the values are left to chance. BY_OUTPUT: with everything that is optional, else with little."""
    channels = x.shape[1]
    weight, bias, mean, var = torch.ones(4, channels).unbind()
    updates, extras = torch.tensor(0), mask == BY_OUTPUT
    payload, pivot = moments.moments(x)
    shared = payload[(2 - kinds) * channels :]
    given: tuple[Any, ...] = (weight, bias, None, [], [mean, var, updates], None, 0.1)
    if extras:
        given = (None, None, x, [var.clone(), updates.clone()], [mean, var, updates], updates.clone(), None)
    y, saved, narrow = apply.apply(x, shared, pivot, *given, EPS, 5.0, 1000, kinds, activation, extras, 0.1)
    kept = pivot, given[0], saved, narrow
    cotangents, *_ = cosums.cosums(x, x, y if extras else None, *kept, kinds, mask, activation, 0.1)
    through = UNMASKED if extras else mask
    combine.combine(x, x, cotangents, shared[-1], pivot, saved, narrow, EPS, kinds, through, activation, 0.1)
    apply.update_running(shared[:-1], shared[-1], shared[-1], *given[4:], kinds, extras)


def main() -> None:
    """Every kernel, in the variants that shapes, layouts and options make of it."""
    driver.set_active(Absent())
    for module in (moments, apply, cosums, combine):
        vars(module)["launch"] = compile_launch
    options = itertools.cycle(
        [
            {"mask": UNMASKED, "activation": NONE},
            {"mask": BY_OUTPUT, "activation": RECTIFIED},
            {"mask": BY_INPUT, "activation": RECTIFIED},
            *({"mask": UNMASKED, "activation": number} for number in NUMBERS.values() if number != RECTIFIED),
        ]
    )
    for shape, dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float32)):
        x = torch.zeros(shape, dtype=dtype)
        kinds = 1 + (dtype is torch.bfloat16)
        call(x, kinds=kinds, **next(options))
        if x.dim() == 4:
            call(x.to(memory_format=torch.channels_last), kinds=3 - kinds, **next(options))


if __name__ == "__main__":
    main()
