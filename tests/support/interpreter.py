"""What Triton's interpreter warns of, where Triton is or not."""

from __future__ import annotations

import pytest

INTERPRETED = [
    # The interpreter computes with numpy, and also in lanes that nothing is kept of.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    # Triton 3.6 takes bounds of loops from arrays of one value; numpy 2.4 has made an error of it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton.runtime.interpreter"),
]
"""Marks of tests that run kernels in the interpreter."""
