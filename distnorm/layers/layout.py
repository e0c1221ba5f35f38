"""Which slots a method needs in each layer, found by running it once on two samples of zeros."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.methods import Method
from distnorm.types import Affine, Direction, Layout, Link


def layout_of(layers: Iterable[tuple[str, _BatchNorm]], method: Method) -> Layout:
    """Return the sizes of what ``method`` shares in each of ``layers``, and the device of their first tensor."""
    sizes: dict[tuple[str, Direction], int] = {}
    device = torch.device("cpu")
    known: dict[int, tuple[int, int]] = {}
    for name, layer in layers:
        if not sizes:
            device = next((each.device for each in (*layer.parameters(), *layer.buffers())), device)
        features = layer.num_features
        if features not in known:
            known[features] = _measure(method, features, layer.eps)
        sizes[name, "forward"], sizes[name, "backward"] = known[features]
    return Layout(sizes, device)


def _measure(method: Method, features: int, eps: float) -> tuple[int, int]:
    seen: list[tuple[int, int]] = []

    def share(count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        theta_KC = link(sums_KC / count)
        seen.append((sums_KC.numel(), theta_KC.numel()))
        return theta_KC, sums_KC.new_full((), count)

    # Not on meta tensors: torch 2.13 imports Dynamo for the first of these, which takes seconds.
    x, one_C = torch.zeros(2, features, device="cpu"), torch.ones(features, device="cpu")
    method.normalize(x, share, Affine(one_C, one_C, eps, one_C, torch.zeros((), device="cpu")))
    (found,) = seen
    return found
