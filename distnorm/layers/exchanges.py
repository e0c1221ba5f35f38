"""What one training forward shares through: nothing, or a line to the policy."""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.autograd.keep_local import KeepLocal
from distnorm.compat.dispatch_state import exporting, is_fake
from distnorm.layers import checks
from distnorm.layers.line import NOW, Line
from distnorm.layers.site import Site
from distnorm.policies import Local


def exchange_of(site: Site, x_NCL: Tensor, plain: bool) -> Line | KeepLocal:
    """Start a training forward of ``x_NCL``; ``plain``: no mode or transform is active."""
    values = x_NCL.numel() // x_NCL.shape[1]
    if not plain and torch.compiler.is_compiling():
        # The exported graph of a policy that shares nothing then needs no live model.
        if isinstance(site.conversion.recipe.policy, Local) and exporting():
            checks.check_alone(site, x_NCL)
            return KeepLocal(values)
        return Line(site, None, NOW, opaque=True, values=values)
    if not plain and is_fake(x_NCL):  # there may be no ranks, and there are no values to share
        return Line(site, None, NOW, opaque=True, values=values)
    binding = site.conversion.bound()
    alone = binding.alone and (x_NCL.is_cpu or x_NCL.is_cuda)
    if alone and not (plain and values > 1):
        checks.check_alone(site, x_NCL)
    if alone or plain:
        binding.forward_begins(site.name)
    if alone:
        return KeepLocal(values, plain=plain)
    return Line(site, binding, binding.step, opaque=not plain, values=values)
