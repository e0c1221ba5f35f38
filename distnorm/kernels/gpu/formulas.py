"""The C-sized float64 arithmetic of methods, inside of kernels: the same as csrc/arithmetic.c, channel by channel.

KINDS selects the method: batch norm shares two sums, RMS one. ``payload`` are shared sums and their count;
``saved[KINDS + 1, C]`` are their means and d scale / d weight; ``y = (x - pivot) * scale + shift``.
"""

import triton
import triton.language as tl


@triton.jit
def divisor(count):
    """Return the count, or 1 if there are no values."""
    return tl.where(count > 0, count, 1.0)


@triton.jit
def variance(mean, square):
    """Rounding can leave less than 0; NaN stays NaN."""
    var = square - mean * mean
    return tl.where(var < 0, 0.0, var)


@triton.jit
def values_or(pointer, c, here, default: tl.constexpr):
    """Return ``[C]`` values in float64, or the default if there are none."""
    if pointer is None:
        found = tl.cast(default, tl.float64)
    else:
        found = tl.load(pointer + c, mask=here, other=0.0).to(tl.float64)
    return found


@triton.jit
def correction(square, followed, updates, clip, clip_after, eps, c, here):
    """How far RMS follows the running second moment: sqrt((square + eps) / (followed + eps)), clipped; 1 at first."""
    if followed is None:
        found = tl.cast(1.0, tl.float64)
    else:
        ratio = tl.sqrt((square + eps) / (tl.load(followed + c, mask=here, other=1.0).to(tl.float64) + eps))
        least = 1.0 / tl.cast(clip, tl.float64)
        ratio = tl.where(ratio < least, least, tl.where(ratio > clip, clip, ratio))
        found = tl.where(tl.load(updates) >= clip_after, ratio, 1.0)
    return found


@triton.jit
def forward(payload, pivot, weight, bias, followed, updates, clip, clip_after, eps, C, c, here, KINDS: tl.constexpr):
    """Shared means (of x, of its square), their count, d scale / d weight, scale and shift."""
    count = tl.load(
        payload + KINDS * C + 0 * c
    )  # per channel: Triton 3.7's interpreter cannot spread a comparison of it
    total = divisor(count)
    square = tl.load(payload + (KINDS - 1) * C + c, mask=here, other=0.0) / total
    gain, middle = values_or(weight, c, here, 1.0), values_or(pivot, c, here, 0.0)
    if KINDS == 2:
        mean = tl.load(payload + c, mask=here, other=0.0) / total
        factor = 1.0 / tl.sqrt(variance(mean, square) + eps)
    else:
        mean = tl.zeros_like(square)
        factor = correction(square, followed, updates, clip, clip_after, eps, c, here) / tl.sqrt(square + eps)
    scale = factor * gain
    shift = (middle - mean) * scale + values_or(bias, c, here, 0.0)
    return mean, square, count, factor, scale, shift


@triton.jit
def misfits(sums, divisor, count, C, LIMIT: tl.constexpr, KINDS: tl.constexpr, COLS: tl.constexpr):
    """Whether moments of any channel are not finite, or above ``LIMIT``; ``sums / divisor`` are their means.

    ``divisor`` and ``count`` are as wide as ``COLS``.
    """
    lane = tl.arange(0, COLS)
    broken = lane * 0
    for at in range(0, C, COLS):
        here = at + lane < C
        square = tl.load(sums + (KINDS - 1) * C + at + lane, mask=here, other=0.0) / divisor
        if KINDS == 2:
            mean = tl.load(sums + at + lane, mask=here, other=0.0) / divisor
            broken |= (tl.abs(mean) <= LIMIT).to(tl.int32) ^ 1
            square = variance(mean, square) * (count / tl.where(count > 1, count - 1.0, 1.0))
        broken |= (tl.abs(square) <= LIMIT).to(tl.int32) ^ 1
    return tl.max(broken, axis=0)


@triton.jit
def update_running(mean, square, count, running_mean, running_var, updates, momentum, c, fresh, KINDS: tl.constexpr):
    """``running += (moments - running) * momentum`` in ``fresh`` channels; without a momentum, the plain average.

    ``updates`` is how often that was done before; ``count`` is above 1 where anything is fresh.
    """
    if momentum is None:
        rate = 1.0 / (tl.load(updates).to(tl.float64) + 1.0)
    else:
        rate = tl.cast(momentum, tl.float64)
    if KINDS == 2:
        old = tl.load(running_mean + c, mask=fresh, other=0.0).to(tl.float64)
        tl.store(running_mean + c, (old + (mean - old) * rate).to(running_mean.dtype.element_ty), mask=fresh)
        var = variance(mean, square) * (count / tl.where(count > 1, count - 1.0, 1.0))
    else:
        var = square
    old = tl.load(running_var + c, mask=fresh, other=0.0).to(tl.float64)
    tl.store(running_var + c, (old + (var - old) * rate).to(running_var.dtype.element_ty), mask=fresh)


@triton.jit
def pull(ones, twos, saved, pivot, weight, cotangents, weight_grad, bias_grad, C, c, here, KINDS: tl.constexpr):
    """From sum(dy) and sum(dy * (x - pivot)) to cotangents of the method's link, and the parameters' gradients."""
    factor = tl.load(saved + KINDS * C + c, mask=here, other=0.0)
    gain, middle = values_or(weight, c, here, 1.0), values_or(pivot, c, here, 0.0)
    if KINDS == 2:
        centred = twos + (middle - tl.load(saved + c, mask=here, other=0.0)) * ones
        tl.store(cotangents + c, -factor * gain * ones, mask=here)
    else:
        centred = twos + middle * ones
    tl.store(cotangents + (KINDS - 1) * C + c, -factor * gain * centred, mask=here)
    tl.store(weight_grad + c, (factor * centred).to(weight_grad.dtype.element_ty), mask=here)
    tl.store(bias_grad + c, ones.to(bias_grad.dtype.element_ty), mask=here)


@triton.jit
def link(cotangents, saved, total, pivot, eps, C, c, here, KINDS: tl.constexpr):
    """From shared cotangents to ``dx = dy * scale + level + (x - pivot) * slope``."""
    count = divisor(tl.load(total))
    middle = values_or(pivot, c, here, 0.0)
    square = tl.load(saved + (KINDS - 1) * C + c, mask=here, other=0.0)
    tilt = tl.load(cotangents + (KINDS - 1) * C + c, mask=here, other=0.0)
    if KINDS == 2:
        mean = tl.load(saved + c, mask=here, other=0.0)
        slope = tilt / ((variance(mean, square) + eps) * count)
        level = tl.load(cotangents + c, mask=here, other=0.0) / count + (middle - mean) * slope
    else:
        slope = tilt / ((square + eps) * count)
        level = middle * slope
    return level, slope
