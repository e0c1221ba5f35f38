"""Layers under other people's modes, transforms and tensor classes: as stock batch norm, or refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import distnorm
from distnorm import Ledger
from tests.support.threads import run_threads

# torch 2.13 compiles its own formulas of forward-mode derivatives by a function that it has deprecated.

RECIPES = ["local_bn", "sync_bn", "mabn", "lazy_bn"]


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def images(seed: int = 1, n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trace(model: nn.Module, run: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of every step, and what the buffers are in the end."""
    seen = []
    for x in inputs:
        model.zero_grad()
        run(x).square().sum().backward()
        seen += [parameter.grad.clone() for parameter in model.parameters()]
    return [*seen, *(buffer.clone() for buffer in model.buffers())]


def close(given: list[Tensor], expected: list[Tensor]) -> None:
    for one, two in zip(given, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# --- selective checkpoints -----------------------------------------------------------------------


def _all_but_relu(context: object, op: object, *args: object, **options: object) -> CheckpointPolicy:
    return _saved(op is not torch.ops.aten.relu.default)


def _nothing(context: object, op: object, *args: object, **options: object) -> CheckpointPolicy:
    return _saved(False)


def _convolutions(context: object, op: object, *args: object, **options: object) -> CheckpointPolicy:
    return _saved("convolution" in str(op))


def _collectives(context: object, op: object, *args: object, **options: object) -> CheckpointPolicy:
    return _saved("distnorm" in str(op))


def _saved(wanted: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("saved", [_all_but_relu, _nothing, _convolutions, _collectives])
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_selective_checkpoints(recipe: str, fuse: bool, saved: Callable[..., CheckpointPolicy]) -> None:
    """Same gradients, running statistics and collectives as without, on two ranks."""

    stock = net()  # threads share the generator of random numbers

    def run(rank: int, selective: bool) -> tuple[list[Tensor], int]:
        model = distnorm.convert(copy.deepcopy(stock), recipe, fuse=fuse)
        contexts = functools.partial(create_selective_checkpoint_contexts, saved)
        once = functools.partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
        with Ledger(model) as ledger:
            seen = trace(model, once if selective else model, [images(10 * rank + step) for step in range(3)])
        return seen, ledger.collectives

    for given, expected in zip(run_threads(2, run, True), run_threads(2, run, False), strict=True):
        assert given[1] == expected[1]
        close(given[0], expected[0])


# --- modes that look on --------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mode_that_counts_changes_nothing(recipe: str, where: str) -> None:
    def step(model: nn.Module, watched: bool) -> list[Tensor]:
        mode = Counting()
        x = images()
        if not watched:
            return trace(model, model, [x])
        if where == "both":
            with mode:
                return trace(model, model, [x])
        if where == "forward":
            with mode:
                loss = model(x).square().sum()
            loss.backward()
        else:
            loss = model(x).square().sum()
            with mode:
                loss.backward()
        assert mode.seen
        return [*(parameter.grad for parameter in model.parameters()), *model.buffers()]

    stock = net()

    def run(rank: int, watched: bool) -> list[Tensor]:
        return step(distnorm.convert(copy.deepcopy(stock), recipe), watched)

    for given, expected in zip(run_threads(2, run, True), run_threads(2, run, False), strict=True):
        close(given, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fake_tensors_leave_no_trace(recipe: str) -> None:
    model = distnorm.convert(net(), recipe)
    before = copy.deepcopy(model.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(images()))
        y.sum().backward()
        assert y.shape == (2, 4, 4, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.zero_grad(set_to_none=True)
    expected = distnorm.convert(net(), recipe)
    close(trace(model, model, [images()]), trace(expected, expected, [images()]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fake_model(recipe: str) -> None:
    with FakeTensorMode():
        model = distnorm.convert(net(), recipe)
        y = model(torch.randn(2, 3, 8, 8))
        y.sum().backward()
        assert y.shape == (2, 4, 4, 4) and all(each.grad is not None for each in model.parameters())
        assert model.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_operations_are_counted(recipe: str) -> None:
    stock, mine = net(), distnorm.convert(net(), recipe)
    counts = []
    for model in (stock, mine):
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_traced_step_shares_when_it_runs(recipe: str) -> None:
    model = distnorm.convert(net(), recipe)
    graph = make_fx(lambda x: model(x))(images())
    expected = distnorm.convert(net(), recipe)
    expected(images())
    close([graph(images(2))], [expected(images(2))])


# --- tensor classes ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_results_of_collectives_under_way(world: None, recipe: str) -> None:
    given, expected = (distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), recipe) for _ in range(2))
    x = images()
    under_way = collectives.all_reduce(x, "sum", dist.group.WORLD)
    assert type(under_way) is not Tensor
    close([given(under_way), *given.buffers()], [expected(x), *expected.buffers()])


def test_a_sharded_tensor_is_refused(world: None) -> None:
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), "sync_bn")
    x = distribute_tensor(images(), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(TypeError, match=r"0: given a DTensor; .* x.to_local\(\)"):
        layer(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_that_are_kept_negated(recipe: str) -> None:
    given, expected = (distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), recipe) for _ in range(2))
    x = images()
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    close([given(negative), *given.buffers()], [expected(x), *expected.buffers()])


# --- transforms ----------------------------------------------------------------------------------

Use = Callable[[nn.Module, Tensor], object]


def _parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in layer.named_parameters()}


def _dual(layer: nn.Module, x: Tensor) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent


def _batched(layer: nn.Module, x: Tensor) -> object:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    many = torch.randn(5, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(y, [leaf, *layer.parameters()], many, is_grads_batched=True)


def _loss(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: (layer(x).pow(3) * torch.linspace(0, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum()


def _ensemble(layer: nn.Module, x: Tensor) -> object:
    parameters, buffers = stack_module_state([copy.deepcopy(layer) for _ in range(3)])
    call = lambda *state_and_x: functional_call(layer, state_and_x[:2], state_and_x[2:])  # noqa: E731
    return vmap(call)(parameters, buffers, torch.stack([x, 2 * x, x + x.cos()]))


def _buffers_given(layer: nn.Module, x: Tensor) -> object:
    buffers = {name: each.clone() for name, each in layer.named_buffers()}
    found = grad(lambda p: functional_call(layer, (p, buffers), (x,)).pow(3).sum())(_parameters(layer))
    return found, buffers


USES: dict[str, Use] = {
    "grad": lambda layer, x: grad(_loss(layer))(x),
    "grad of parameters": lambda layer, x: grad(lambda p: functional_call(layer, p, (x,)).pow(3).sum())(
        _parameters(layer)
    ),
    "buffers given": _buffers_given,
    "vjp": lambda layer, x: vjp(layer, x)[1](x.cos()),
    "jvp": lambda layer, x: jvp(layer, (x,), (x.cos(),)),
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jacfwd": lambda layer, x: jacfwd(layer)(x),
    "hessian": lambda layer, x: torch.func.hessian(_loss(layer))(x),
    "vmap": lambda layer, x: vmap(layer)(torch.stack([x, x.cos()])),
    "vmap of grad": lambda layer, x: vmap(grad(_loss(layer)))(torch.stack([x, x.cos()])),
    "ensemble": _ensemble,
    "is_grads_batched": _batched,
    "jacobian": lambda layer, x: jacobian(layer, x),
    "jacobian, vectorized": lambda layer, x: jacobian(layer, x, vectorize=True),
    "jacobian, forward": lambda layer, x: jacobian(layer, x, vectorize=True, strategy="forward-mode"),
    "hessian, vectorized": lambda layer, x: hessian(_loss(layer), x, vectorize=True),
    "dual": _dual,
}


def _attempt(use: Use, layer: nn.Module, x: Tensor) -> tuple[object, str]:
    try:
        return use(layer, x), ""
    except RuntimeError as error:
        return None, str(error)


def _pairs(training: bool, tracks: bool, recipe: str) -> tuple[nn.Module, nn.Module, Tensor]:
    stock = nn.BatchNorm2d(2, track_running_stats=tracks, dtype=torch.double)
    with torch.no_grad():
        stock.weight.copy_(torch.tensor([0.5, -2.0]))
        if tracks:
            stock.running_var.fill_(2.0)
    mine = distnorm.convert(nn.Sequential(copy.deepcopy(stock)), recipe)[0]
    x = torch.randn(3, 2, 2, 1, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    return stock.train(training), mine.train(training), x


@pytest.mark.parametrize("tracks", [False, True], ids=["", "tracks"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_transforms_of_what_shares_nothing(use: Use, training: bool, tracks: bool) -> None:
    """Where stock works, so does this; where stock refuses, so does this."""
    stock, mine, x = _pairs(training, tracks, "sync_bn")
    expected, refused = _attempt(use, stock, x)
    given, why = _attempt(use, mine, x)
    assert bool(why) is bool(refused), why
    torch.testing.assert_close(given, expected)
    if not refused:
        torch.testing.assert_close(dict(mine.named_buffers()), dict(stock.named_buffers()))


REVERSE = [use for name, use in USES.items() if not {"jvp", "jacfwd", "hessian", "dual", "forward"} & {*name.split()}]


def _is_refused(message: str) -> None:
    assert message.startswith("0: ")
    assert "transform" in message or "second derivative" in message
    assert "sync_bn" in message or "local_bn" in message


@pytest.mark.parametrize("use", [use for name, use in USES.items() if name != "jacobian"])
@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_transforms_of_what_steps_share_are_refused_by_name(recipe: str, use: Use) -> None:
    _, mine, x = _pairs(True, False, recipe)
    _is_refused(_attempt(use, mine, x)[1])


# Threads cannot differentiate forward at once: torch 2.13 keeps the level of that for the process.
@pytest.mark.parametrize("use", [use for use in REVERSE if use is not USES["jacobian"]])
def test_transforms_of_what_ranks_share_are_refused_by_name(use: Use) -> None:
    def run(rank: int) -> str:
        _, mine, x = _pairs(True, False, "sync_bn")
        distnorm.attach(mine)
        return _attempt(use, mine, x)[1]

    for message in run_threads(2, run):
        _is_refused(message)


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_transforms_before_the_first_step_are_refused_by_name(recipe: str) -> None:
    """Where hooks would look at the first forward, too."""
    model = distnorm.convert(net(), recipe)
    for use in (USES["grad"], USES["vmap"]):
        with pytest.raises(RuntimeError, match=r"1: .* cannot pass a transform"):
            use(model, images())
    model(images()).sum().backward()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_traces_of_training(recipe: str, dtype: torch.dtype) -> None:
    """As stock where nothing is shared, else refused by name."""
    stock, x = net().to(dtype), images().to(dtype)
    mine = distnorm.convert(copy.deepcopy(stock), recipe)
    if recipe in ("mabn", "lazy_bn"):
        with pytest.raises(RuntimeError, match=r"1: .* torch.jit.trace"):
            torch.jit.trace(mine, (x,), check_trace=False)
        return
    traced, expected = (torch.jit.trace(each, (x,), check_trace=False) for each in (mine, stock))
    torch.testing.assert_close(traced(2 * x), expected(2 * x))
    torch.testing.assert_close(dict(traced.named_buffers()), dict(expected.named_buffers()))


def test_ranks_do_not_meet_inside_of_a_transform() -> None:
    def run(rank: int) -> str:
        _, mine, x = _pairs(True, True, "sync_bn")
        return _attempt(_ensemble, mine, x)[1]

    for message in run_threads(2, run):
        assert "distnorm.attach(model)" in message
