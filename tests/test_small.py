"""A small layer compares with its last forward: any change in between has the effect that it has on torch's."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import distnorm

SHAPE = 4, 3, 2, 5
Change = Callable[[nn.Module], object]
Run = Callable[[nn.Module, Tensor], Tensor]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def assign(**values: object) -> Change:
    def change(layer: nn.Module) -> None:
        for name, value in values.items():
            setattr(layer, name, value)

    return change


def called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def within(context: Callable[[], AbstractContextManager[object]]) -> Run:
    def run(layer: nn.Module, x: Tensor) -> Tensor:
        with context():
            return called(layer, x)

    return run


def saved_tensors() -> AbstractContextManager[object]:
    return torch.autograd.graph.saved_tensors_hooks(lambda each: each.clone(), lambda each: each)


def repeated(layer: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
    """Checkpointed, but for torch's layer, which would update its running statistics a second time."""
    ours = isinstance(layer, distnorm.DistNorm)
    return checkpoint(layer, x, use_reentrant=use_reentrant) if ours else called(layer, x)  # type: ignore[no-any-return]


def functional(layer: nn.Module, x: Tensor) -> Tensor:
    given = {name: 3 * each.detach() for name, each in layer.named_parameters()}
    return torch.func.functional_call(layer, given, (x,))  # type: ignore[no-any-return]


CHANGES: dict[str, Change] = {
    "nothing": lambda layer: None,
    "weight": assign(weight=nn.Parameter(torch.tensor([3.0, 4.0, 5.0]))),
    "bias": assign(bias=None),
    "weight's values": lambda layer: layer.weight.data.mul_(3),
    "weight's data": lambda layer: setattr(layer.weight, "data", torch.tensor([3.0, 4.0, 5.0])),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "eps": assign(eps=0.5),
    "momentum": assign(momentum=0.7),
    "plain average": assign(momentum=None),
    "running_mean": lambda layer: layer.register_buffer("running_mean", torch.ones(3)),
    "running_var": lambda layer: layer.register_buffer("running_var", torch.full((3,), 2.0)),
    "no statistics": assign(running_mean=None, running_var=None),
    "a plain weight": lambda layer: (delattr(layer, "weight"), assign(weight=torch.full((3,), 3.0))(layer)),
    "a plain bias after none": lambda layer: (
        assign(bias=None)(layer),
        delattr(layer, "bias"),
        assign(bias=torch.ones(3))(layer),
    ),
    "no count": assign(num_batches_tracked=None),
    "untracked": assign(track_running_stats=False),
    "reset": lambda layer: layer.reset_running_stats(),  # type: ignore[operator]
    "evaluation": lambda layer: layer.eval(),
    "loaded": lambda layer: layer.load_state_dict({name: each + 2 for name, each in layer.state_dict().items()}),
}
RUNS: dict[str, Run] = {
    "called": called,
    "without gradients": within(torch.no_grad),
    "other shape": lambda layer, x: called(layer, x[:3]),
    "channels last": lambda layer, x: called(layer, x.contiguous(memory_format=torch.channels_last)),
    "negated": lambda layer, x: called(layer, torch._neg_view(x)),
    "float64": lambda layer, x: called(layer.double(), x.double()),
    "functional": functional,
    "checkpointed": lambda layer, x: repeated(layer, x, use_reentrant=False),
    "checkpointed, reentrant": lambda layer, x: repeated(layer, x, use_reentrant=True),
    "saved tensors": within(saved_tensors),
    "counted": within(lambda: FlopCounterMode(display=False)),
    "copied": lambda layer, x: called(copy.deepcopy(layer), x),
    "twice": lambda layer, x: called(layer, called(layer, x)),
}


def trained(layer: nn.Module, change: Change, run: Run) -> list[Tensor]:
    """Outputs, gradients and the layer's tensors of three steps: one, one after ``change``, and one more."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    for step in range(3):
        if step == 1:
            change(layer)
        x = (torch.randn(SHAPE) * 3 + 2).requires_grad_()
        y = run(layer, x) if step == 1 else layer.float()(x)
        if y.requires_grad:
            y.square().sum().backward()
            assert x.grad is not None
            found += [x.grad]
        found += [y, *(each.detach().clone() for each in (*layer.parameters(), *layer.buffers()))]
    return found + [each.grad for each in layer.parameters() if each.grad is not None]


# ``double()`` does not cast plain attributes, so torch's layer refuses such a mixture.
PAIRS = [(one, two) for one in CHANGES for two in RUNS if not (one.startswith("a plain") and two == "float64")]


@pytest.mark.parametrize(("change", "run"), [(CHANGES[one], RUNS[two]) for one, two in PAIRS], ids=map(str, PAIRS))
def test_changes_have_their_effect(change: Change, run: Run) -> None:
    expected = trained(nn.BatchNorm2d(3), copy.deepcopy(change), run)
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    for one, other in zip(trained(layer, copy.deepcopy(change), run), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_the_second_forward_compares() -> None:
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    layer(torch.randn(SHAPE))
    noted = layer._site.small
    layer(torch.randn(SHAPE))
    assert noted is not None and layer._site.small is noted


@pytest.mark.parametrize("shape", [(4, 4, 2, 5), (4, 3, 2), (1, 3, 1, 1)])
def test_errors_stay(shape: tuple[int, ...]) -> None:
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    layer(torch.randn(SHAPE))
    with pytest.raises(ValueError):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_tensors_of_a_functional_call_are_not_kept(name: str) -> None:
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    values = torch.full((3,), 3.0)
    torch.func.functional_call(layer, {name: values}, (torch.randn(SHAPE),))
    there = weakref.ref(values)
    del values
    gc.collect()
    assert there() is None


def test_replaced_tensors_are_not_kept() -> None:
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    layer(torch.randn(SHAPE))
    there = weakref.ref(layer.weight)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    gc.collect()
    assert there() is None


def test_an_activation_that_does_not_exist_changes_nothing() -> None:
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    layer(torch.randn(SHAPE))
    with pytest.raises(ValueError, match="bogus"):
        layer(torch.randn(SHAPE), activation="bogus")
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("where", ["class", "layer"])
def test_own_checks_of_the_input_stay(where: str) -> None:
    def check(x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError("not finite")

    class Strict(nn.BatchNorm2d):
        def _check_input_dim(self, input: Tensor) -> None:
            check(input)

    layer = distnorm.convert(nn.Sequential(Strict(3) if where == "class" else nn.BatchNorm2d(3)), "local_bn")[0]
    layer(torch.randn(SHAPE))
    if where == "layer":
        layer._check_input_dim = check
    with pytest.raises(ValueError, match="not finite"):
        layer(torch.full(SHAPE, torch.nan))
    assert layer.running_mean.isfinite().all()


def test_a_mode_keeps_what_it_has_seen() -> None:
    class Keeping(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.batch_norm:
                kept.append(result)
            return result

    kept: list[Tensor] = []
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    for _ in range(2):
        with Keeping():
            layer(torch.randn(SHAPE), relu=True)
    assert len(kept) == 2 and all((each < 0).any() for each in kept)


def test_a_residual_that_is_added_to_changes_in_place() -> None:
    layer, residual = distnorm.convert(nn.BatchNorm2d(3), "local_bn"), torch.zeros(SHAPE)
    for _ in range(2):
        assert layer(torch.randn(SHAPE), residual=residual, widen=None) is residual
    assert residual.any()


def test_a_residual_of_another_class_stays_one() -> None:
    class Own(Tensor):
        pass

    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    for _ in range(2):
        assert isinstance(layer(torch.randn(SHAPE), residual=torch.randn(SHAPE).as_subclass(Own)), Own)


def test_a_compiled_layer_is_one_graph_that_does_not_depend_on_the_note() -> None:
    layer = distnorm.convert(nn.BatchNorm2d(3), "local_bn")
    layer(torch.randn(SHAPE))
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    compiled(torch.randn(SHAPE))
    layer._site.small = None
    compiled(torch.randn(SHAPE))
    assert counter.frame_count == 1
