"""Subclasses of batch norm as people write them, and what each does to the statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import batch_norm as normalized

# --- they go through super().forward -------------------------------------------------------------


class Plain(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.03)


class Scaled(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class OldSpelling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super(OldSpelling, self).forward(x)  # noqa: UP008
        return F.silu(y)


class Grandchild(Scaled):
    def forward(self, x: Tensor, shift: float = 0.25) -> Tensor:
        return super().forward(x) + shift


class Gate:
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x)


class Mixed(Gate, nn.BatchNorm2d):
    pass


class ByHelper(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.normed(x))

    def normed(self, x: Tensor) -> Tensor:
        return super().forward(x)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return x.tanh()


class Branches(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = super().forward(x)
        else:
            return super().forward(x)
        return y if x.dim() == 4 else y.squeeze()


class Ghost(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(2)])


class Split(nn.BatchNorm2d):
    """The first half of a batch through its own statistics, the second half through those of another norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.others = nn.ModuleList([nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.others[0](second)])


class Frozen(Scaled):
    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


class Saved(nn.BatchNorm2d):
    """With old names in its checkpoints."""

    def _load_from_state_dict(self, state: dict, prefix: str, *args: object) -> None:
        if prefix + "gamma" in state:
            state[prefix + "weight"] = state.pop(prefix + "gamma")
        super()._load_from_state_dict(state, prefix, *args)


class AnyLayout(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


CONVERTED = [
    Plain, Scaled, OldSpelling, Grandchild, Mixed, ByHelper, Branches, Ghost, Split, Frozen, Saved, AnyLayout,
]  # fmt: skip

# --- they do not, or not always ------------------------------------------------------------------


class Functional(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Renamed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, None, None, self.weight, self.bias, True)


class Both(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return self.evaluated(x)

    def evaluated(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.0, self.eps, False
        )


class Named(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x) * 2


class Skips(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        return super().forward(x)


class OwnMoments(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps)


class Lazily(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.eps > 1 else super().forward(x)


class ShadowsOurs(Scaled):
    epilogue = "none"


class ChildOfBoth(Both):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Unreadable(nn.BatchNorm2d):
    pass


exec("def forward(self, x): return super(Unreadable, self).forward(x)")
Unreadable.forward = forward  # type: ignore[name-defined]  # noqa: F821

LEFT = {
    Functional: "calls F.batch_norm itself",
    Renamed: "calls normalized itself",
    Both: "calls torch.batch_norm itself",
    Named: r"calls nn.BatchNorm2d.forward by its name",
    Skips: r"does not pass through super\(\).forward\(...\) on every path",
    OwnMoments: r"does not pass through super\(\).forward\(...\) on every path",
    Lazily: r"does not pass through super\(\).forward\(...\) on every path",
    ShadowsOurs: "it has epilogue, as converted layers have",
    ChildOfBoth: "Both.evaluated calls torch.batch_norm itself",
    Unreadable: "the source of Unreadable.forward cannot be read",
}

# --- wrappers ------------------------------------------------------------------------------------


class NodeNorm(nn.Module):
    """As for graphs: nodes in rows, a norm inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.module = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.size(0) < 2 and self.training else self.module(x)


class SparseNorm(nn.Module):
    """As for sparse tensors: coordinates, and features that alone are normalized."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x[0], self.bn(x[1])
