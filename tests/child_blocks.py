"""Models in which a module ends in a norm, and its caller adds something or applies an activation, as packages do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import known_classes as known


def conv_norm(size: int = 1, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, size, padding=size // 2, bias=False), nn.BatchNorm2d(4), *more)


class Inverted(nn.Module):
    """As torchvision's MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv_norm(1, nn.ReLU6(inplace=True)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.use_res_connect = True

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


class InPlace(nn.Module):
    """As torchvision's MobileNetV3: a flag decides on an addition in place, to what a sequence of sequences ends in."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.add = nn.Sequential(conv_norm(3, nn.Hardswish()), conv_norm()), True

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.add:
            result += input
        return result


class ConvBlock(nn.Module):
    """As pytorchcv's."""

    def __init__(self, activate: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.use_bn, self.activate = True, activate
        if activate:
            self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.use_bn:
            x = self.bn(x)
        if self.activate:
            x = self.act(x)
        return x


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBlock(), ConvBlock(activate=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv2(x)
        return x


class Unit(nn.Module):
    """Three levels above the norm; the norm of the identity runs before."""

    def __init__(self) -> None:
        super().__init__()
        self.resize_identity = True
        self.body, self.identity_conv, self.act = Bottleneck(), ConvBlock(activate=False), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.resize_identity:
            identity = self.identity_conv(x)
        else:
            identity = x
        x = self.body(x)
        x = x + identity
        x = self.act(x)
        return x


class ConvNormAct(nn.Module):
    """As timm's."""

    def __init__(self, act: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.conv, self.aa = nn.Conv2d(4, 4, 1), None
        self.bn = known.BatchNormAct2d(4, act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = self.aa(x)
        return x


class Timm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_pw, self.conv_dw, self.conv_pwl = ConvNormAct(nn.SiLU), conv_norm(), ConvNormAct()
        self.bn = known.BatchNormAct2d(4, nn.Identity)
        self.drop_path, self.has_skip, self.shortcut = nn.Identity(), True, None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv_pw(x)
        x = self.conv_dw(x)
        x = self.bn(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        shortcut = x
        x = self.conv_pwl(x)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)
        x = self.drop_path(x) + self.drop_path(shortcut)
        return x


class ShortcutLast(nn.Module):
    """As timm's and transformers' ResNets: the norm of the shortcut runs last, so that one adds the main branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2, self.act2, self.se = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), None
        self.downsample: nn.Module | None = conv_norm()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x


class BothEnd(nn.Module):
    """As torchvision's video ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.downsample, self.relu = conv_norm(3), conv_norm(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv2(x)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class Called(nn.Module):
    """The other side of an addition in place is a call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.shortcut = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), conv_norm()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class CalledIdentity(Called):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential()


class CalledPool(Called):
    """What has no effects may run before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.shortcut(x))


class TwoBranches(nn.Module):
    """As RepVGG's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1x1, self.conv_kxk, self.act = conv_norm(1), conv_norm(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_1x1(x) + self.conv_kxk(x)
        return self.act(x)


class Renamed(nn.Module):
    """As torchvision's DenseNet, with an activation that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.act = conv_norm(), Gelu()
        self.more, self.bound = conv_norm(1, Nothing()), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.silu(features, inplace=True)
        again = self.more(out)
        last = self.act(again)
        norm = self.bound
        return norm(last) + x


class Gelu(nn.Module):
    """As transformers' activations."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.gelu(input)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


class Gated(nn.Module):
    """A side that is known, and one branch each that returns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.residual, self.project = ConvBlock(activate=False), True, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.project is None:
            return y + x if self.residual else y
        return self.project(y)


class Outer(nn.Module):
    """A sequence in which modules that end in norms are followed by activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Bottleneck(), nn.Identity(), nn.SiLU(), nn.Sequential(conv_norm(), nn.ELU()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers(x))


FOUND: dict[type[nn.Module], dict[str, str]] = {
    Inverted: {"conv.0.1": "relu6", "conv.2": "residual"},
    InPlace: {"block.0.1": "hardswish", "block.1.1": "residual"},
    Unit: {"body.conv1.bn": "relu", "body.conv2.bn": "residual, relu"},
    Timm: {"conv_pw.bn": "silu", "bn": "residual", "conv_pwl.bn": "residual"},
    ShortcutLast: {"downsample.1": "residual, relu"},
    BothEnd: {"downsample.1": "residual, relu"},
    Called: {"shortcut.1": "residual, relu"},
    CalledIdentity: {"bn": "residual, relu"},
    CalledPool: {"bn": "residual, relu"},
    TwoBranches: {"conv_kxk.1": "residual, relu"},
    Renamed: {"features.1": "silu", "more.1": "gelu", "bound": "residual"},
    Gated: {"body.bn": "residual"},
    Outer: {"layers.0.conv1.bn": "relu", "layers.0.conv2.bn": "silu", "layers.3.0.1": "elu"},
}


# --- code in which nothing may be merged over modules ----------------------------------------------


class Silent(nn.Module):
    """Gradients are not computed where the child's norm runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.bn(x)


class Sometimes(Silent):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return self.bn(x)
        return x


class Half(Silent):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) / 2


class Keeps(Silent):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        self.last = x
        return x


class Several(Silent):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        y = x
        for each in (x, x * 2):
            y = self.bn(each)
        return y


class Activates(Silent):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.bn(x))


class Adds(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.scale, self.body = nn.Parameter(torch.ones(1)), body

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x + self.body(x)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn, self.first = conv_norm(), nn.BatchNorm2d(4), nn.Parameter(torch.ones(1))


class ReadLater(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        z = torch.relu(y)
        return z * y


class ReadInLoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(2):
            x = x + y
            y = self.body(x)
            z = torch.relu(y)
        return z


class Aliased(Base):
    """The addition in place shows in ``kept``, too."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        kept = out
        out += self.body(x)
        return out * kept


class NotItsOwn(Base):
    """The addition in place changes the caller's tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.first
        y = x
        y += self.body(x * 2)
        return y + 2 * x


class ChangesItsInput(nn.Module):
    """The child changes its input before its norm, so the other side of the addition must wait."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Doubles(), nn.BatchNorm2d(4))
        self.pool, self.first = nn.AvgPool2d(3, 1, 1), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.first
        return self.body(x) + self.pool(x)


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return x


class Draws(Base):
    """Random numbers are drawn after the norm, as before."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.first * x) + self.drop(x)


class SeesItsFrame(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        z = torch.relu(y)
        return z * len(locals())


LEFT = [ReadLater, ReadInLoop, Aliased, NotItsOwn, ChangesItsInput, Draws, SeesItsFrame]
LEFT_CHILDREN = [Silent, Sometimes, Half, Keeps, Several, Activates]
