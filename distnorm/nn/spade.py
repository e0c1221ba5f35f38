"""Spatially adaptive denormalization: scale and shift of every pixel are computed from a segmentation map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from distnorm.layers.tracing import is_traced, leaf
from distnorm.nn import checks
from distnorm.nn.norms import shared_norm
from distnorm.recipe import Recipe

INSTANCE_NORM = "instance_norm"


class SPADE(nn.Module):
    """Batch norm by a recipe, then a scale and shift per pixel: ``y = norm(x) * (1 + gamma(map)) + beta(map)``.

    ``forward(input, map)``: input and output are ``[N, C, H, W]``. The map, usually one-hot, is ``[N, label_channels,
    H', W']`` and is resized to ``[H, W]`` by the nearest pixel; a convolution to ``hidden`` channels and a ReLU are
    shared, and one convolution each makes ``gamma`` and ``beta``. ``norm`` is a BatchNorm2d without affine parameters,
    converted to the recipe. It sends what the recipe sends: with ``sync_bn`` one collective per direction in training,
    and none in evaluation. With ``recipe="instance_norm"``, torch's InstanceNorm2d takes its place and nothing is sent.

    Raises:
        TypeError: the input is not floating point, or the map is complex.
        ValueError: wrong shape; or as ``DistNorm``.
        RuntimeError: as ``DistNorm``.
    """

    def __init__(
        self,
        num_features: int,
        label_channels: int,
        recipe: Recipe | str | None = "sync_bn",
        hidden: int = 128,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the norm and the three convolutions.

        Args:
            num_features: the number of channels C of the input.
            label_channels: the number of channels of the map: of classes, where it is one-hot.
            recipe: a ``Recipe``, text such as ``"group_bn(size=4)"``, or ``"instance_norm"``. None leaves the norm to
                ``distnorm.convert`` of the model that holds this layer.
            hidden: the number of channels between the convolutions.
            kernel_size: that of all convolutions.
            eps: added to the variance.
            momentum: as of torch.nn.BatchNorm2d.
            track_running_stats: as of torch.nn.BatchNorm2d.
            device: where parameters and running statistics are.
            dtype: that of the parameters.
        """
        super().__init__()
        sizes = {"num_features": num_features, "label_channels": label_channels, "hidden": hidden}
        checks.check_arguments(self, **sizes, kernel_size=kernel_size, eps=eps)
        self.num_features, self.label_channels = num_features, label_channels
        self.norm: nn.Module  # before the convolutions: none of them feeds it
        if recipe == INSTANCE_NORM:
            self.norm = nn.InstanceNorm2d(num_features, eps, affine=False)
        else:
            norm = nn.BatchNorm2d(num_features, eps, momentum, False, track_running_stats, device=device, dtype=dtype)
            self.norm = shared_norm(norm, recipe, checks.name_of(self))

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, device=device, dtype=dtype)

        self.shared = conv(label_channels, hidden)
        self.gamma, self.beta = conv(hidden, num_features), conv(hidden, num_features)

    def forward(self, input: Tensor, map: Tensor) -> Tensor:
        """Return the normalized input, scaled and shifted by what is computed from ``map``."""
        if is_traced(input):
            node: Tensor = leaf(self, input, map)
            return node
        checks.check_features(self, input, self.num_features, checks.IMAGE)
        if isinstance(self.norm, nn.InstanceNorm2d):
            checks.check_spatial(self, input)
        self._check_map(map, input)
        resized = F.interpolate(map.to(input.dtype), size=input.shape[2:], mode="nearest")
        hidden = F.relu(self.shared(resized))
        normalized = self.norm(input)
        return torch.addcmul(self.beta(hidden), normalized, 1 + self.gamma(hidden)).to(input.dtype)

    def _check_map(self, map: Tensor, input: Tensor) -> None:
        checks.check_tensor(self, map, "map")
        if map.is_complex():
            raise TypeError(f"{checks.name_of(self)}: the map has dtype {map.dtype}; need a real one.")
        if torch.jit.is_tracing():
            return
        alike = map.dim() == 4 and map.shape[:2] == (input.shape[0], self.label_channels)
        if not (alike and map.shape[2:].numel() > 0):
            raise ValueError(
                f"{checks.name_of(self)}: the map has shape {tuple(map.shape)}; need [N, label_channels, H, W] = "
                f"[{input.shape[0]}, {self.label_channels}, ...]. One-hot of class ids [N, H, W]: "
                "torch.nn.functional.one_hot(ids, label_channels).movedim(-1, 1)."
            )

    def extra_repr(self) -> str:
        """Return the numbers of channels of input and map."""
        return f"{self.num_features}, {self.label_channels}"
