"""A recipe: a method, a policy, and what happens to weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, final

from distnorm.methods import Method
from distnorm.policies.base import APolicy
from distnorm.validation import Momentum, check_fields, kind

Weights = Literal["none", "centralized", "standardized", "normalized"]


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The normalization to which ``convert`` converts batch norm.

    Args:
        method: which statistics and which transform, such as ``BatchNorm()``.
        policy: how ranks share sums, such as ``AllReduce()``.
        weights: what happens to the weights of the convolutions and linear layers before the norms, per output filter:
            ``"none"``, ``"centralized"`` (minus its mean), ``"standardized"`` (mean 0 and variance 1), or
            ``"normalized"`` (its length is a parameter of its own). docs/weights.md compares them.
        momentum: momentum of the running statistics; None keeps that of each layer.
        overlap: whether backward collectives overlap with the weight gradients of the convolutions that follow.
        name: the name of a named recipe, else None. Comparisons ignore it.

    Raises:
        ValueError: a field has the wrong type; the message names it.
    """

    method: Annotated[Method, kind(Method, "a distnorm method, such as BatchNorm()")]
    policy: APolicy
    weights: Weights = "none"
    momentum: Momentum | None = None
    overlap: bool = False
    name: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        if self.method.needs_max and self.policy.facts.keeps_cotangents:
            raise ValueError(
                f"Recipe(method={self.method!r}, policy={self.policy!r}): the method shares maxima, which cannot be "
                "averaged over steps. Use an exact policy, such as AllReduce(), or Local()."
            )
