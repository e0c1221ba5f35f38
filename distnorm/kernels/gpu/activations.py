"""Formulas of the activations that may follow a norm: value and gradient by their input z, at float32 precision.

Each function of ``(z, dy, a)`` is an activation with its parameter ``a``, and returns its value and the gradient for z
of a loss whose gradient for the value is ``dy``. Values that are not finite come out as from torch's own functions.
The others are parts of these. ``csrc/activations.h`` has the same in C, written from this file by
``python -m tests.support.activations_header``; so functions consist of assignments and a return of plain arithmetic,
``tl.exp``, ``tl.abs`` and ``tl.where``. ``kernels/activations.py`` has the names.
"""

from typing import Any

import triton
import triton.language as tl

from distnorm.kernels.activations import NONE, NUMBERS


@triton.jit
def logistic(z):
    """``1 / (1 + exp(-z))``."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def exp_less_1(z):
    """``exp(z) - 1``, by its series near 0, where the difference would lose digits."""
    rest = 1.0 + z * 0.25 * (1.0 + z * 0.2 * (1.0 + z * 0.16666667 * (1.0 + z * 0.14285714)))
    series = z * (1.0 + z * 0.5 * (1.0 + z * 0.33333333 * rest))
    return tl.where(tl.abs(z) < 0.3, series, tl.exp(z) - 1.0)


@triton.jit
def normal_above(z):
    """The standard normal distribution above ``z >= 0``, up to 2e-7.

    That is ``erfc(z / sqrt(2)) / 2``, as ``exp(-z^2 / 2)`` times a polynomial in ``1 / (1 + 0.475 z)``. The polynomial
    was fitted by least squares with weights that level out the error.
    """
    t = 1.0 / (1.0 + 0.475 * z)
    high = 0.272025114 + t * (-0.423736051 + t * (0.218926189 + t * -0.041533397))
    return t * (0.189325636 + t * (0.196668191 + t * (0.0883243308 + t * high))) * tl.exp(z * z * -0.5)


@triton.jit
def relu6(z, dy, a):
    """``min(max(z, 0), 6)``."""
    return tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z)), tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 0.0, dy))


@triton.jit
def leaky_relu(z, dy, a):
    """Z where that is above 0, else ``a z``."""
    return tl.where(z > 0.0, z, z * a), tl.where(z > 0.0, dy, dy * a)


@triton.jit
def elu(z, dy, a):
    """Z where that is above 0, else ``a (exp(z) - 1)``."""
    return tl.where(z <= 0.0, a * exp_less_1(z), z), tl.where(z <= 0.0, dy * (a * tl.exp(z)), dy)


@triton.jit
def sigmoid(z, dy, a):
    """``1 / (1 + exp(-z))``."""
    s = logistic(z)
    return s, dy * (s * (1.0 - s))


@triton.jit
def silu(z, dy, a):
    """``z sigmoid(z)``."""
    s = logistic(z)
    return z * s, dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def mish(z, dy, a):
    """``z tanh(log(1 + exp(z)))``, where ``tanh(log(1 + e)) = n / (n + 2)`` with ``n = e (e + 2)``."""
    e = tl.exp(tl.where(z > 20.0, 20.0, z))
    n = e * (e + 2.0)
    t = n / (n + 2.0)
    return z * t, dy * (t + z * (e / (1.0 + e)) * (1.0 - t * t))


@triton.jit
def gelu(z, dy, a):
    """``z P(z)`` with the standard normal distribution P, whose density is ``exp(-z^2 / 2) / sqrt(2 pi)``."""
    above = normal_above(tl.abs(z))
    p = tl.where(z < 0.0, above, 1.0 - above)
    return z * p, dy * (p + z * (0.3989422804 * tl.exp(z * z * -0.5)))


@triton.jit
def gelu_tanh(z, dy, a):
    """``z (1 + tanh(u)) / 2 = z sigmoid(2 u)`` with ``u = sqrt(2 / pi) (z + 0.044715 z^3)``."""
    s = logistic(1.5957691216 * z * (1.0 + 0.044715 * z * z))
    return z * s, dy * (s + z * s * (1.0 - s) * (1.5957691216 * (1.0 + 0.134145 * z * z)))


@triton.jit
def hardsigmoid(z, dy, a):
    """``min(max(z + 3, 0), 6) / 6``."""
    h = tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0))
    return h * 0.16666667, tl.where(z > -3.0, tl.where(z < 3.0, dy * 0.16666667, 0.0), 0.0)


@triton.jit
def hardswish(z, dy, a):
    """``z hardsigmoid(z)``."""
    h = tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0))
    return z * h * 0.16666667, tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, dy, dy * (z * 0.33333333 + 0.5)))


FORMULAS: dict[int, Any] = {number: globals().get(name) for name, number in NUMBERS.items()} | {NONE: None}
"""The functions by the activations' numbers; kernels need none for ReLU."""
