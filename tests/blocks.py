"""Models whose code says what follows a norm, in forms that ``convert(..., fuse=True)`` finds, and must not take."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn import functional as F


class Block(nn.Module):
    """Two norms and what the methods below need."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.silu = nn.ReLU(inplace=True), nn.SiLU()
        self.downsample: nn.Module | None = None
        self.seen: list[Tensor] = []


# --- code in which something is found ------------------------------------------------------------


class Torchvision(Block):
    """As ResNet's basic block is written there."""

    def forward(self, x: Tensor) -> Tensor:
        """Of more lines than one:

        the source and the code must have equal texts.
        """
        identity = x

        out = self.conv(x)
        out = self.a(out)
        out = self.relu(out)

        out = self.conv(out)
        out = self.b(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class Nested(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(self.conv(torch.relu(self.a(self.conv(x))))), inplace=True)


class Returned(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.conv(self.a(x).relu()))
        return functional.relu_(out + x)


class Added(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.conv(F.relu(self.a(x))))
        y = x + y
        return self.silu(y)


class Helper(Block):
    def forward(self, x: Tensor, *, times: int = 2) -> Tensor:
        for _ in range(times):
            x = self.step(x)
        return x

    def step(self, x: Tensor, scale: float = 0.5) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            y = self.b(y)
            y = torch.relu(y)
            return y * scale

        return inner(self.relu(self.a(x)))


class Named(Block):
    """Names that are bound on the way, and read where they were read before."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(y := self.conv(x)) + y)
        return x + self.b(y := torch.relu(y))


class Sequence(nn.Sequential):
    def __init__(self) -> None:
        relu = nn.ReLU()
        super().__init__(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), relu, relu, nn.BatchNorm2d(4), nn.SiLU())


class Activated(Block):
    """As YOLO's convolutions are written."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.b(self.silu(self.a(self.conv(x)))), inplace=True)


class WithOptions(Block):
    def __init__(self) -> None:
        super().__init__()
        self.leaky = nn.LeakyReLU(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.a(x), -0.2)
        y = self.b(self.conv(y))
        return self.leaky(y)


class Keywords(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.a(x), approximate="tanh")
        return F.elu(self.b(y), alpha=0.5, inplace=True)


class Methods(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).sigmoid()
        y = self.b(y)
        y = y.relu_()
        return y


class Flags(Block):
    """As pytorchcv's blocks are written."""

    def __init__(self) -> None:
        super().__init__()
        self.use_pad, self.use_norm, self.activate, self.late = False, True, True, None

    def forward(self, x: Tensor) -> Tensor:
        if self.use_pad:
            x = self.silu(x)
        x = self.conv(x)
        if self.use_norm:
            x = self.a(x)
        if self.activate:
            x = self.silu(x)
        if self.b is not None:
            x = self.b(x)
        if not self.activate or self.late:
            x = x * 2
        return x


class Idle(Block):
    """As timm's residual blocks are written."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.pool = nn.Dropout(0.0), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.drop(y)
        if self.downsample is not None:
            y = self.downsample(y)
        y = self.silu(y)
        y = self.pool(y)
        y = self.pool(self.b(y))
        y += x
        return self.relu(y)


class Branches(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = True, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = self.relu(x)
        else:
            x = self.a(x)
        if self.last is None:
            return self.relu(x)
        return self.b(x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms, self.act = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3)), nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.act(self.norms[i](x))
        return x + self.norms[2](x)


class Nothings(nn.Sequential):
    """Layers that do nothing between a norm and its activation."""

    def __init__(self) -> None:
        layers = nn.BatchNorm2d(4), nn.Identity(), nn.Dropout2d(0.0), nn.ELU(0.7, inplace=True)
        super().__init__(*layers, nn.BatchNorm2d(4), nn.ReLU6(), nn.BatchNorm2d(4), nn.Identity())


class Alive(Block):
    """The shortcut's norm runs between the norm and the sum: nothing may change places, so that one adds."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.b(x)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


FOUND: dict[type[nn.Module], dict[str, str]] = {
    Activated: {"a": "silu", "b": "hardswish"},
    Alive: {"downsample.1": "residual, relu"},
    WithOptions: {"a": "leaky_relu", "b": "leaky_relu"},
    Keywords: {"a": "gelu_tanh", "b": "elu"},
    Methods: {"a": "sigmoid", "b": "relu"},
    Flags: {"a": "silu"},
    Idle: {"a": "silu", "b": "residual, relu"},
    Branches: {"a": "relu"},
    Listed: {"norms.0": "mish", "norms.1": "mish", "norms.2": "residual"},
    Nothings: {"0": "elu", "4": "relu6"},
    Torchvision: {"a": "relu", "b": "residual, relu"},
    Nested: {"a": "relu", "b": "residual, relu"},
    Returned: {"a": "relu", "b": "residual, relu"},
    Added: {"a": "relu", "b": "residual"},
    Helper: {"a": "relu", "b": "relu"},
    Named: {"a": "residual, relu", "b": "residual"},
    Sequence: {"1": "relu", "4": "silu"},
}


# --- code in which nothing may be ----------------------------------------------------------------


class UsedTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.relu(y)
        return z + y


class Between(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.seen.append(y)
        y = F.relu(y)
        return y


class OtherActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.a(x)) + F.relu(self.b(x) * 2)


class OtherOptions(Block):
    def forward(self, x: Tensor) -> Tensor:
        slope = 0.1 + len(self.seen)
        return F.leaky_relu(self.a(x), slope) + F.prelu(self.b(x), x.new_ones(1))


class SwitchesItself(Block):
    def __init__(self) -> None:
        super().__init__()
        self.activate = False

    def forward(self, x: Tensor) -> Tensor:
        self.activate = not self.activate
        x = self.a(x)
        if self.activate:
            x = self.silu(x)
        return x


class Drops(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(4), nn.Dropout(1.0), nn.SiLU(), nn.BatchNorm2d(4), nn.PReLU())


class AlsoItself(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + y
        return y


class Kept(Block):
    """A closure reads the value after the function has returned."""

    def forward(self, x: Tensor) -> Tensor:
        self.later = lambda: y
        y = self.a(x)
        return torch.relu(y)


class Global(Block):
    def forward(self, x: Tensor) -> Tensor:
        global y
        y = self.a(x)
        return torch.relu(y)


class Attribute(Block):
    """The class's own ``relu`` comes before the module of that name."""

    relu = staticmethod(torch.sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.a(x))


class Super(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.relu(self.a(y))


class Halves:
    @staticmethod
    def relu(x: Tensor) -> Tensor:
        return x / 2


class Shadowed(Block):
    def forward(self, x: Tensor) -> Tensor:
        F = Halves
        return F.relu(self.a(x))


class Rebound(Block):
    def forward(self, x: Tensor) -> Tensor:
        other, self = self, Torchvision()
        return self.relu(other.a(x))


class Walrus(Block):
    """The first ``y`` is read before the second is bound."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        return y + self.a(y := self.conv(x))


class InnerWalrus(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        return y + self.a(self.conv(x) + torch.tanh(y := x * 2))


class WalrusInComprehension(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        return y + self.a(torch.stack([(y := each + x) for each in (x, 2 * x)]).sum(0))


class Nonlocal(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3

        def halve() -> Tensor:
            nonlocal y
            y = y / 2
            return x

        return y + self.a(halve())


shift = torch.ones(1, dtype=torch.float64)


class RebindsGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        global shift
        shift = shift.new_ones(1)
        return shift + self.a(self.double(x))

    def double(self, x: Tensor) -> Tensor:
        global shift
        shift = shift * 2
        return x


class ReplacesItsRelu(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.relu = nn.ReLU()
        return self.relu(self.a(self.drop(x)))

    def drop(self, x: Tensor) -> Tensor:
        return x


class GrowsItsShortcut(Block):
    def forward(self, x: Tensor) -> Tensor:
        identity = x
        self.downsample = nn.Tanh()
        out = self.a(x)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        self.downsample = None
        return out


class Finally(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.a(x)
            return torch.relu(y)
        finally:
            self.seen.append(y)


class Handled(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        try:
            y = self.a(x)
            y = F.relu(y)
        except RuntimeError:
            self.seen.append(y)
        return y


class Options(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.a(input=x)) + self.relu(self.b(*[x]))


unread: dict[str, type[nn.Module]] = {"Block": Block}  # type: ignore[dict-item]
exec("class Unread(Block):\n    def forward(self, x):\n        return self.relu(self.a(x))\n", unread)

LEFT: list[type[nn.Module]] = [
    UsedTwice,
    Between,
    OtherActivation,
    OtherOptions,
    SwitchesItself,
    Drops,
    AlsoItself,
]
LEFT += [Walrus, InnerWalrus, WalrusInComprehension, Nonlocal, RebindsGlobal]
LEFT += [ReplacesItsRelu, GrowsItsShortcut, Finally, Handled]
LEFT += [Kept, Global, Attribute, Super, Shadowed, Rebound, Options, unread["Unread"]]
