"""A recipe: one point of the grid of methods and policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from distnorm.methods import Method
from distnorm.policies import Policy

Weights = Literal["none", "centralized"]


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``convert`` puts in place of batch norm.

    Args:
        method: which statistics and which transform, such as ``BatchNorm()``.
        policy: how sums are shared, such as ``AllReduce()``.
        weights: what happens to the weights of the layers before: ``"none"`` leaves them alone, ``"centralized"``
            takes the mean out of every filter.
        momentum: of the running statistics; None keeps each layer's own.
        overlap: whether backward collectives hide behind the weight gradients of the convolutions that follow.
        name: the recipe's name where it has one; it takes no part in comparisons.

    Raises:
        ValueError: a field of another kind; the message names it.
    """

    method: Method
    policy: Policy
    weights: Weights = "none"
    momentum: float | None = None
    overlap: bool = False
    name: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.method, Method):
            raise ValueError(f"Recipe(method={self.method!r}): need a distnorm method, such as BatchNorm().")
        if not isinstance(self.policy, Policy):
            raise ValueError(f"Recipe(policy={self.policy!r}): need a distnorm policy, such as AllReduce().")
        if self.weights not in ("none", "centralized"):
            raise ValueError(f'Recipe(weights={self.weights!r}): allowed are "none" and "centralized".')
        if not isinstance(self.overlap, bool):
            raise ValueError(f"Recipe(overlap={self.overlap!r}): allowed are True and False.")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise ValueError(f"Recipe(momentum={self.momentum!r}): need a weight of the newest value in (0, 1].")
