"""Compiles every kernel for an H100 or H200, as launches would; prints what came out. Run without the interpreter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distnorm.kernels.gpu import apply, combine, cosums, moments

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# The types of all arguments. What stands in a list is a constant: so are sizes of 1, for Triton.
INT = "i32"
PLANES = {"N": INT, "L": INT, "C": INT, "PLANES": [True], "VEC": [16], "ROWS": [2], "COLS": [1024]}
ROWS = {"N": INT, "L": [1], "C": INT, "PLANES": [False], "VEC": [1], "ROWS": [32], "COLS": [64]}
SMALL = {"N": INT, "L": [1], "C": [1], "PLANES": [True], "VEC": [2], "ROWS": [1], "COLS": [2]}
ONE = {"N": INT, "L": [1], "C": [1], "PLANES": [False], "VEC": [1], "ROWS": [1], "COLS": [1]}
WIDE = ("sums", "parts", "wire", "shared", "saved", "cotangents", "means", "total", "landed")
NARROW = ("pivot", "narrow", "weight", "bias", "weight_grad", "bias_grad", "running_mean", "running_var")
BASE: dict[str, Any] = dict.fromkeys(("tiles", "count", "splits", "clip_after"), INT)
BASE |= dict.fromkeys(WIDE, "*fp64") | dict.fromkeys(NARROW, "*fp32") | {"count": INT, "updates": "*i64"}
BASE |= dict.fromkeys(("momentum", "eps", "clip"), "fp32")
BASE |= {name: [None] for name in ("y", "residual", "dresidual", "followed", "followed_updates", "earlier")}
BASE |= {"KINDS": [2], "MASK": [0], "RELU": [False], "WHOLE": [True]}
RARE = {"momentum": [None], "earlier": "*i64", "followed": "*fp32", "followed_updates": "*i64", "KINDS": [1]}
RARE |= {"weight": [None], "bias": [None], "WHOLE": [False]}
MERGE = {"C": INT, "ROWS": [32], "COLS": [32]}
VECTORS, SPILLS = re.compile(r"ld\.global\.v4\.b32"), re.compile(rb"STACK:[1-9]|LOCAL:[1-9]")


def big(dtype: str) -> dict[str, Any]:
    """The types of big tensors."""
    return dict.fromkeys(("x", "dy", "dx", "y"), dtype)


def build(kernel: Any, note: str, types: dict[str, Any], folder: Path) -> None:
    """Compile, and print the kernel's name, how it loads, and whether registers spill to memory."""
    names = kernel.arg_names
    signature = {name: "constexpr" if isinstance(types[name], list) else types[name] for name in names}
    constants = {(at,): types[name][0] for at, name in enumerate(names) if signature[name] == "constexpr"}
    aligned = [
        at for at, name in enumerate(names) if signature[name][0] == "*" or (name in "LC" and types[name] == INT)
    ]
    source = ASTSource(kernel, signature, constants, {(at,): [["tt.divisibility", 16]] for at in aligned})
    built = triton.compile(source, target=TARGET, options={"num_warps": 4})
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, check=True).stdout
    loads = "vectors" if VECTORS.search(built.asm["ptx"]) else "scalars"
    print(kernel.__name__, note, loads, "spills" if SPILLS.search(usage) else "")


def main() -> None:
    """Every kernel: for planes and for rows, aligned and as small as can be, with and without what is optional."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for note, image in (("aligned", PLANES), ("aligned", ROWS), ("small", SMALL), ("small", ONE)):
            for dtype in ("*bf16", "*fp32") if note == "aligned" else ("*bf16",):
                plain = BASE | image | big(dtype) | {"y": dtype}
                fused = plain | RARE | dict.fromkeys(("residual", "dresidual"), dtype) | {"RELU": [True], "MASK": [2]}
                for types in (plain, fused) if dtype == "*bf16" else (plain,):
                    for kernel in (
                        moments.sums_kernel,
                        apply.apply_kernel,
                        cosums.cosums_kernel,
                        combine.combine_kernel,
                    ):
                        build(kernel, note, types, folder)
        for types in (BASE | MERGE, BASE | RARE | MERGE):
            for kernel in (moments.merge_kernel, cosums.pull_kernel, apply.absorb_kernel):
                build(kernel, "merged", types, folder)


if __name__ == "__main__":
    main()
