"""What conditional norms, AdaIN and SPADE refuse: the error names the layer, the value, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import distnorm
from distnorm.nn import SPADE, AdaIN, ConditionalBatchNorm, ConditionalInstanceNorm

C, K = 3, 5
IDS = torch.tensor([4, 0])
X = torch.randn(2, C, 4, 4, generator=torch.Generator().manual_seed(0))
MAP = torch.zeros(2, K, 4, 4)
BAD_LABELS = {
    "an id too large": (torch.tensor([1, K]), ValueError, "class id 5 is out of range; need 0 to 4"),
    "a negative id": (torch.tensor([-1, 0]), ValueError, "class id -1 is out of range; need 0 to 4"),
    "fractions": (torch.tensor([0.0, 1.0]), TypeError, "class ids [N] have dtype torch.float32; need whole numbers"),
    "booleans": (torch.tensor([True, False]), TypeError, "class ids [N] have dtype torch.bool"),
    "too few": (torch.tensor([0]), ValueError, "labels have shape (1,); need class ids [N] = [2]"),
    "a column": (torch.tensor([[0], [1]]), ValueError, "labels have shape (2, 1); need class ids [N] = [2]"),
    "too narrow": (torch.ones(2, K - 1), ValueError, "[N, num_classes] = [2, 5]"),
    "whole weights": (torch.ones(2, K, dtype=torch.int64), TypeError, "have dtype torch.int64; need floating point"),
    "a list": ([0, 1], TypeError, "the label is [0, 1]; need a tensor"),
    "elsewhere": (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "labels are on meta"),
}
BAD_INPUTS = {
    "channels": (torch.ones(2, C + 1, 4, 4), ValueError, "the input has 4 channels (shape (2, 4, 4, 4)); need 3"),
    "whole numbers": (X.long(), TypeError, "the input has dtype torch.int64; need a floating-point one"),
    "too flat": (torch.ones(3), ValueError, "the input has shape (3,); need [N, C"),
}


def kind(layer: nn.Module) -> str:
    return type(layer).__name__


def refuses(layer: nn.Module, inputs: tuple[Any, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        layer(*inputs)
    assert str(raised.value).startswith(f"{type(layer).__name__}(") and words in str(raised.value)


@pytest.mark.parametrize("built", [ConditionalBatchNorm, ConditionalInstanceNorm])
@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_do_not_fit(built: type[nn.Module], case: str) -> None:
    labels, error, words = BAD_LABELS[case]
    refuses(built(C, K), (X, labels), error, words)


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("layer", [ConditionalBatchNorm(C, K), ConditionalInstanceNorm(C, K), SPADE(C, K)], ids=kind)
def test_inputs_that_do_not_fit(layer: nn.Module, case: str) -> None:
    x, error, words = BAD_INPUTS[case]
    refuses(layer, (x, MAP if isinstance(layer, SPADE) else IDS), error, words)


BAD_STYLES = {
    "channels": (X[:, :2], ValueError, "the style has shape (2, 2, 4, 4); need [N, C, ...] = [2, 3, ...]"),
    "samples": (X[:1], ValueError, "the style has shape (1, 3, 4, 4); need [N, C, ...] = [2, 3, ...]"),
    "no values": (X[..., :0], ValueError, "at least 1 value per sample and channel"),
    "no space": (X[..., 0, 0], ValueError, "the style has shape (2, 3); need"),
    "whole numbers": (X.long(), TypeError, "the style has dtype torch.int64"),
    "none": (None, TypeError, "the style is None; need a tensor"),
}


@pytest.mark.parametrize("case", BAD_STYLES)
def test_styles_that_do_not_fit(case: str) -> None:
    style, error, words = BAD_STYLES[case]
    refuses(AdaIN(), (X, style), error, words)


BAD_MAPS = {
    "class ids": (torch.zeros(2, 4, 4, dtype=torch.int64), ValueError, "One-hot of class ids [N, H, W]"),
    "channels": (
        MAP[:, 1:],
        ValueError,
        "the map has shape (2, 4, 4, 4); need [N, label_channels, H, W] = [2, 5, ...]",
    ),
    "samples": (MAP[:1], ValueError, "need [N, label_channels, H, W] = [2, 5, ...]"),
    "no pixels": (MAP[..., :0], ValueError, "the map has shape (2, 5, 4, 0)"),
    "complex": (MAP.cfloat(), TypeError, "the map has dtype torch.complex64"),
    "none": (None, TypeError, "the map is None; need a tensor"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
@pytest.mark.parametrize("recipe", ["sync_bn", "instance_norm"])
def test_maps_that_do_not_fit(recipe: str, case: str) -> None:
    map, error, words = BAD_MAPS[case]
    refuses(SPADE(C, K, recipe, hidden=4), (X, map), error, words)


@pytest.mark.parametrize("layer", [ConditionalInstanceNorm(C, K), AdaIN(), SPADE(C, K, "instance_norm")], ids=kind)
def test_one_value_per_instance(layer: nn.Module) -> None:
    other = {AdaIN: X, SPADE: MAP}.get(type(layer), IDS)
    refuses(layer, (X[:, :, :1, :1], other), ValueError, "at least 2 values per sample and channel")


def test_errors_name_the_place_in_a_converted_model() -> None:
    model = nn.ModuleDict({"first": ConditionalBatchNorm(C, K), "last": SPADE(C, K)})
    distnorm.convert(model, "sync_bn")
    with pytest.raises(ValueError, match=r"^first\.norm: class id 5 is out of range; need 0 to 4"):
        model["first"](X, torch.tensor([5, 5]))
    with pytest.raises(ValueError, match=r"^last\.norm: the map has shape"):
        model["last"](X, MAP[:1])
    with pytest.raises(ValueError, match=r"^ConditionalBatchNorm\(3, 5\): 1 value per channel across 1 rank"):
        ConditionalBatchNorm(C, K)(X[:1, :, 0, 0], IDS[:1])


BAD_ARGUMENTS = {
    "no classes": (lambda: ConditionalBatchNorm(C, 0), r"ConditionalBatchNorm\(num_classes=0\): need a whole number"),
    "no channels": (lambda: ConditionalInstanceNorm(0, K), r"ConditionalInstanceNorm\(num_features=0\)"),
    "a negative eps": (lambda: ConditionalInstanceNorm(C, K, eps=-1.0), r"\(eps=-1\.0\): need a number above 0"),
    "too much": (lambda: AdaIN(alpha=1.5), r"AdaIN\(alpha=1\.5\): need a number, at least 0 and at most 1"),
    "an even kernel": (lambda: SPADE(C, K, kernel_size=4), r"SPADE\(kernel_size=4\): need an odd whole number"),
    "an unknown recipe": (lambda: SPADE(C, K, "instance_nrom"), "unknown recipe 'instance_nrom'"),
    "an unknown option": (lambda: ConditionalBatchNorm(C, K, "sync_bn(size=2)"), "size"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_arguments_that_do_not_fit(case: str) -> None:
    make, words = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=words):
        make()


def test_subclasses_are_named() -> None:
    class Small(SPADE):
        def __init__(self) -> None:
            super().__init__(C, K, hidden=0)

    with pytest.raises(ValueError, match=r"^Small\(hidden=0\): need a whole number of channels"):
        Small()
