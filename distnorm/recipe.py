"""A recipe: one point of the grid of methods and policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, final

from distnorm.methods import Method
from distnorm.policies.base import APolicy
from distnorm.validation import Momentum, check_fields, kind

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

    method: Annotated[Method, kind(Method, "a distnorm method, such as BatchNorm()")]
    policy: APolicy
    weights: Weights = "none"
    momentum: Momentum | None = None
    overlap: bool = False
    name: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
