"""The closed form of P P^T g against matrices and against a change of variables, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distnorm
from tests.preconditioning import reference
from tests.preconditioning.reference import DAMPING, EPS, channels_last, damped, explicit

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear of sequences": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "linear of one sample": (lambda: nn.Linear(5, 3), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, dilation=2), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 6)),
    "stride and padding": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (2, 3, 5, 6)),
    "padding with values": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 5, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 6)),
    "conv2d of one sample": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
}


def stepped(layer: nn.Module, x: Tensor, **options: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of weight and bias, as they are and as the optimizer saw them."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    distnorm.precondition(layer, optimizer, momentum=1.0, damping=DAMPING, eps=EPS, **options)
    layer(x).square().sin().sum().backward()
    plain = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    return *plain, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scaling", [False, True])
def test_the_product_with_explicit_matrices(kind: str, scaling: bool) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    layer, x = make().double(), 3 * torch.randn(shape, dtype=torch.float64) + 2
    g_weight, g_bias, weight, bias = stepped(layer, x, scaling=scaling)
    rows = channels_last(x, layer.weight.dim() - 2)
    var = damped(rows.var(0, correction=0))
    expected = explicit(g_weight, g_bias, rows.mean(0), var, getattr(layer, "groups", 1))
    scale = min(1.0, len(rows) / layer.weight[0].numel()) if scaling else 1.0
    torch.testing.assert_close((weight, bias), tuple(scale * each for each in expected))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d", "depthwise"])
def test_it_is_the_gradient_of_the_layer_with_normalized_input(kind: str) -> None:
    """Steps in the normalized layer's parameters, taken back to the layer's own. Without padding, outputs agree."""
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    layer, x = make().double(), 3 * torch.randn(shape, dtype=torch.float64) + 2
    dims = layer.weight.dim() - 2
    rows = channels_last(x, dims)
    groups = getattr(layer, "groups", 1)
    mean, sigma = rows.mean(0), damped(rows.var(0, correction=0)).sqrt()
    per_channel = (-1, *[1] * dims)
    normalized = (x - mean.view(per_channel)) / sigma.view(per_channel)
    of_outputs = mean.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0).view(*layer.weight.shape[:2])
    widths = sigma.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0).view(*layer.weight.shape[:2])
    of_outputs, widths = (each.view(*each.shape, *[1] * dims) for each in (of_outputs, widths))

    def own(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's own parameters that give the outputs of the normalized one."""
        return weight / widths, bias - (of_outputs * weight / widths).flatten(1).sum(1)

    inner_weight = (layer.weight * widths).detach().requires_grad_()
    inner_bias = (layer.bias + (of_outputs * layer.weight).flatten(1).sum(1)).detach().requires_grad_()
    run = [F.linear, F.conv1d, F.conv2d, F.conv3d][dims]
    out = run(normalized, inner_weight, inner_bias, **({"groups": groups} if dims else {}))
    torch.testing.assert_close(out, layer(x))
    inner = torch.autograd.grad(out.square().sin().sum(), (inner_weight, inner_bias))
    _, _, weight, bias = stepped(layer, x, scaling=False)
    torch.testing.assert_close((weight, bias), own(*inner))


def test_training_equals_the_transcription() -> None:
    net = reference.Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=reference.RATE)
    distnorm.precondition(net, optimizer, **reference.OPTIONS)
    for step in range(6):
        optimizer.zero_grad()
        x, y = reference.batch(step)
        (reference.loss_of(net, x, y) / len(x)).backward()
        optimizer.step()
    torch.testing.assert_close(dict(net.named_parameters()), reference.train(range(6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_variance_at_a_large_mean(dtype: torch.dtype) -> None:
    """Sums of squares in these types would lose it."""
    torch.manual_seed(0)
    x = (torch.randn(4096, 3) * (1.0 if dtype is torch.bfloat16 else 0.01) + 100).to(dtype)
    layer = nn.Linear(3, 2).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = distnorm.precondition(layer, optimizer, momentum=1.0)
    layer(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(handle.statistics.var, x.double().var(0, correction=0), rtol=1e-4, atol=0)
    assert layer.weight.grad.dtype is dtype


def test_it_helps_where_inputs_are_badly_scaled() -> None:
    """Two linear layers, inputs with a mean and scales of 0.1 to 10: plain SGD at its best rate stays behind."""

    def final(preconditioned: bool, rate: float) -> float:
        torch.manual_seed(0)
        x = torch.randn(256, 6) * torch.tensor([10.0, 3.0, 1.0, 1.0, 0.3, 0.1]) + 3
        y = torch.tanh((x - 3) / x.std(0)).sum(1, keepdim=True)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        if preconditioned:
            distnorm.precondition(net, optimizer, momentum=0.1, damping=0.0)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    rates = [0.001, 0.003, 0.01, 0.03, 0.1]
    plain, better = (min(final(how, rate) for rate in rates) for how in (False, True))
    assert better < 0.5 * plain, (plain, better)
