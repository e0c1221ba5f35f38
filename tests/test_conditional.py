"""Conditional norms, AdaIN and SPADE: their equations and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distnorm.nn import SPADE, AdaIN, ConditionalBatchNorm, ConditionalInstanceNorm
from tests import conditional as expected
from tests.conditional import draw, one_hot_map

N, C, K = 4, 3, 5
IDS = torch.tensor([4, 0, 4, 2])
LAYOUTS = [(7,), (4, 3), (2, 3, 2)]


def worn(layer: nn.Module) -> nn.Module:
    """With parameters that are not the initial ones."""
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number + 10))
    return layer


def cases() -> dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor, Callable[..., Tensor]]]:
    """By name: the layer, its two inputs, and the transcription of it, a function of layer and inputs."""
    blend = draw(N, K, seed=2).softmax(1)

    def by_class(norm: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda layer, x, labels: expected.by_class(norm(x), layer.weight, layer.bias, labels)

    def spade(norm: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda layer, x, map: expected.spade(norm(x), map, dict(layer.named_parameters()))

    kinds = {
        "instance": (ConditionalInstanceNorm, expected.per_instance, LAYOUTS),
        "batch": (ConditionalBatchNorm, expected.per_channel, [(), *LAYOUTS]),
    }
    found: dict[str, Any] = {}
    for name, (kind, norm, layouts) in kinds.items():
        for rest in layouts:
            x = 2 * draw(N, C, *rest) + 1
            make = partial(kind, C, K, dtype=torch.float64)
            found[f"{name}, ids, {2 + len(rest)}-D"] = make, x, IDS, by_class(norm)
            found[f"{name}, blend, {2 + len(rest)}-D"] = make, x, blend, by_class(norm)
    for rest, style in [((4, 3), (5, 6)), ((7,), (3,)), ((2, 3, 2), (1,))]:
        name = f"AdaIN, {2 + len(rest)}-D"
        found[name] = AdaIN, draw(N, C, *rest) + 1, 3 * draw(N, C, *style) - 1, lambda _, x, s: expected.adain(x, s)
    found["AdaIN, blended"] = (
        *(lambda: AdaIN(alpha=0.3), draw(N, C, 4, 3), draw(N, C, 2, 2, seed=3)),
        lambda _, x, s: expected.adain(x, s, 0.3),
    )
    image = draw(N, C, 6, 4)
    for name, (options, norm, size) in {
        "SPADE": ({}, expected.per_channel, (6, 4)),
        "SPADE, larger map": ({"recipe": "local_bn"}, expected.per_channel, (12, 9)),
        "SPADE, smaller map": ({"kernel_size": 5}, expected.per_channel, (2, 3)),
        "SPADE, instance": ({"recipe": "instance_norm"}, expected.per_instance, (6, 4)),
        "SPADE, stock": ({"recipe": None, "kernel_size": 1}, expected.per_channel, (6, 4)),
    }.items():
        make = partial(SPADE, C, K, hidden=4, dtype=torch.float64, **options)
        found[name] = make, image, one_hot_map(N, K, *size), spade(norm)
    return found


CASES = cases()
each_case = pytest.mark.parametrize("name", CASES)


def ready(name: str) -> tuple[nn.Module, list[Tensor], Callable[..., Tensor]]:
    make, x, other, reference = CASES[name]
    inputs = [x.clone().requires_grad_(), other.clone().requires_grad_(other.is_floating_point())]
    return worn(make()), inputs, reference


@each_case
def test_values_and_gradients_are_those_of_the_equations(name: str) -> None:
    layer, inputs, reference = ready(name)
    wanted = [each for each in (*inputs, *layer.parameters()) if each.requires_grad]
    y, y_expected = layer(*inputs), reference(layer, *inputs)
    torch.testing.assert_close(y, y_expected, rtol=1e-9, atol=1e-9)
    dy = draw(*y.shape, seed=5)
    found, gradients = (torch.autograd.grad(each, wanted, dy) for each in (y, y_expected))
    torch.testing.assert_close(found, gradients, rtol=1e-7, atol=1e-8)


SMALL = [
    "instance, ids, 4-D",
    "instance, blend, 3-D",
    "batch, ids, 4-D",
    "batch, blend, 2-D",
    "AdaIN, blended",
    "SPADE",
]


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each == "SPADE")) for each in SMALL])
def test_gradients_are_true(name: str) -> None:
    """Also those of gradients, as a penalty on the discriminator's needs them."""
    layer, inputs, _ = ready(name)
    varied = [each for each in inputs if each.requires_grad and name != "SPADE"] or inputs[:1]
    rest = inputs[len(varied) :]
    assert torch.autograd.gradcheck(lambda *each: layer(*each, *rest), varied)
    assert torch.autograd.gradgradcheck(lambda *each: layer(*each, *rest), varied)


@pytest.mark.parametrize("name", ["batch, ids, 4-D", "SPADE"])
def test_evaluation_takes_the_running_statistics(name: str) -> None:
    layer, inputs, _ = ready(name)
    layer(*inputs)
    x = inputs[0].detach()
    mean, var = 0.1 * x.mean((0, 2, 3)), 0.9 + 0.1 * x.var((0, 2, 3))
    normalized = (x - mean.view(1, -1, 1, 1)) / (var + 1e-5).sqrt().view(1, -1, 1, 1)
    layer.eval()
    if name == "SPADE":
        wanted = expected.spade(normalized, inputs[1], dict(layer.named_parameters()))
    else:
        wanted = expected.by_class(normalized, layer.weight, layer.bias, inputs[1])
    torch.testing.assert_close(layer(x, inputs[1]), wanted, rtol=1e-6, atol=1e-6)


def test_content_that_is_its_own_style_stays() -> None:
    """The variance is biased on both sides, and eps is added on both."""
    x = draw(2, 3, 5, 4)
    torch.testing.assert_close(AdaIN()(x, x), x)
    torch.testing.assert_close(AdaIN()(x, x.repeat_interleave(2, 3)), x)  # of another size
    torch.testing.assert_close(AdaIN(alpha=0.0)(x, draw(2, 3, 4)), x)


@pytest.mark.parametrize(
    "name", ["instance, ids, 4-D", "batch, ids, 2-D", "batch, ids, 3-D", "AdaIN, 4-D", "SPADE", "SPADE, instance"]
)
def test_no_samples(name: str) -> None:
    layer, inputs, _ = ready(name)
    x, other = inputs[0].detach()[:0].requires_grad_(), inputs[1].detach()[:0]
    y = layer(x, other)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["instance, ids, 4-D", "batch, ids, 4-D", "AdaIN, 4-D"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Of inputs, with wide parameters: output has the input's dtype, arithmetic is wider."""
    layer, (x, other), reference = ready(name)
    halves = [each.detach().to(dtype) if each.is_floating_point() else each for each in (x, other)]
    y = layer.float()(*halves)
    assert y.dtype == dtype
    wide = [each.double() if each.is_floating_point() else each for each in halves]
    torch.testing.assert_close(y.double(), reference(layer, *wide).double(), rtol=2e-2, atol=4e-2)


def test_autocast() -> None:
    """The first of a network's layers gets float32, the others what a convolution makes: bfloat16."""
    layer, (x, map), reference = ready("SPADE")
    layer.float()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.to(dtype), map.float())
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), reference(layer.double(), x, map), rtol=5e-2, atol=1e-1)
        layer.float()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_whole_numbers_are_class_ids(dtype: torch.dtype) -> None:
    layer, (x, ids), _ = ready("batch, ids, 4-D")
    torch.testing.assert_close(layer(x, ids.to(dtype)), layer(x, ids), rtol=0, atol=0)


def test_a_memory_format_is_kept() -> None:
    x = draw(2, C, 4, 4).contiguous(memory_format=torch.channels_last)
    y = worn(ConditionalBatchNorm(C, K, dtype=torch.float64))(x, IDS[:2])
    assert y.is_contiguous(memory_format=torch.channels_last)
