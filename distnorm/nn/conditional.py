"""Norms with a scale and shift per class: the label of a sample chooses its rows of two tables, or blends them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from distnorm.layers.tracing import is_traced, leaf
from distnorm.nn import checks
from distnorm.nn.norms import affine_per_sample, instance_norm, shared_norm
from distnorm.recipe import Recipe


class _Conditional(nn.Module):
    """The tables ``weight`` and ``bias``, ``[num_classes, num_features]``, which start at 1 and 0."""

    def __init__(
        self, num_features: int, num_classes: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        checks.check_arguments(self, num_features=num_features, num_classes=num_classes)
        self.num_features, self.num_classes = num_features, num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all scales to 1 and all shifts to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, labels: Tensor) -> Tensor:
        """Return the normalized input, scaled and shifted for ``labels``."""
        if is_traced(input):
            node: Tensor = leaf(self, input, labels)
            return node
        return self._forward(input, labels)

    def _forward(self, input: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def _rows(self, labels: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Return scale and shift, ``[N, C]`` each."""
        checks.check_labels(self, labels, samples, self.num_classes, self.weight.device)
        if labels.dim() == 2:
            blend = labels.to(self.weight.dtype)
            return blend @ self.weight, blend @ self.bias
        ids = labels.long()
        return F.embedding(ids, self.weight), F.embedding(ids, self.bias)

    def extra_repr(self) -> str:
        """Return the numbers of channels and classes."""
        return f"{self.num_features}, {self.num_classes}"


class ConditionalInstanceNorm(_Conditional):
    """Instance norm with a scale and shift per class: ``y = norm(x) * weight[label] + bias[label]``.

    ``forward(input, labels)``: input and output are ``[N, C, ...]`` with at least one spatial dimension; ``norm``
    takes mean and biased variance per sample and channel, in training and in evaluation. Labels are class ids ``[N]``,
    or weights ``[N, num_classes]`` that blend the rows of the tables. Issues no collective.

    Raises:
        TypeError: the input or blend weights are not floating point, or class ids are not whole numbers.
        ValueError: wrong shape, fewer than 2 values per sample and channel, labels on another device than the
            parameters, or a class id out of range (on a GPU the device reports it, as ``torch.nn.Embedding``).
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Start with scales of 1 and shifts of 0 for all classes; ``eps`` is added to the variance."""
        super().__init__(num_features, num_classes, device, dtype)
        checks.check_arguments(self, eps=eps)
        self.eps = eps

    def _forward(self, input: Tensor, labels: Tensor) -> Tensor:
        checks.check_features(self, input, self.num_features, checks.SPATIAL)
        checks.check_spatial(self, input)
        return instance_norm(input, *self._rows(labels, input.shape[0]), self.eps)


class ConditionalBatchNorm(_Conditional):
    """Batch norm by a recipe, with a scale and shift per class: ``y = norm(x) * weight[label] + bias[label]``.

    ``forward(input, labels)``: input and output are ``[N, C, ...]``; labels are class ids ``[N]``, or weights ``[N,
    num_classes]`` that blend the rows of the tables. ``norm`` is a BatchNorm2d without affine parameters, converted to
    the recipe. It sends what the recipe sends: with ``sync_bn`` one collective per direction in training, and none in
    evaluation. Labels are not sent.

    Raises:
        TypeError: the input or blend weights are not floating point, or class ids are not whole numbers.
        ValueError: wrong shape, labels on another device than the parameters, or a class id out of range (on a GPU
            the device reports it, as ``torch.nn.Embedding``); or as ``DistNorm``.
        RuntimeError: as ``DistNorm``.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        recipe: Recipe | str | None = "sync_bn",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Start with scales of 1 and shifts of 0 for all classes.

        Args:
            num_features: the number of channels C.
            num_classes: the number of rows of the tables.
            recipe: a ``Recipe``, or text such as ``"group_bn(size=4)"``. None leaves the norm to ``distnorm.convert``
                of the model that holds this layer.
            eps: added to the variance.
            momentum: as of torch.nn.BatchNorm2d.
            track_running_stats: as of torch.nn.BatchNorm2d.
            device: where tables and running statistics are.
            dtype: that of the tables.
        """
        super().__init__(num_features, num_classes, device, dtype)
        checks.check_arguments(self, eps=eps)
        norm = nn.BatchNorm2d(num_features, eps, momentum, False, track_running_stats, device=device, dtype=dtype)
        self.norm = shared_norm(norm, recipe, checks.name_of(self))

    def _forward(self, input: Tensor, labels: Tensor) -> Tensor:
        checks.check_features(self, input, self.num_features, checks.ANY)
        scale_NC, shift_NC = self._rows(labels, input.shape[0])
        return affine_per_sample(self._normalized(input), scale_NC, shift_NC, input.dtype)

    def _normalized(self, input: Tensor) -> Tensor:
        """Apply the norm, which takes images, to any layout."""
        if input.dim() == 4:
            image: Tensor = self.norm(input)
            return image
        normalized: Tensor = self.norm((input[..., None] if input.dim() == 2 else input.flatten(2))[..., None])
        return normalized.view(input.shape)
