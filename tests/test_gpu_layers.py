"""Converted layers on the kernels for GPUs: running statistics, launches, whole models, two ranks."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is made for Linux only")

import distnorm
from distnorm import Recipe
from distnorm.autograd import normalize
from distnorm.autograd.keep_local import KeepLocal
from distnorm.compat import dispatch_state
from distnorm.kernels import stock
from distnorm.kernels.gpu import apply, combine, cosums, gpu_pass, moments
from distnorm.methods import RMS
from distnorm.methods.base import layer_of
from distnorm.policies import Moving, Policy, StaleMix
from distnorm.types import Affine, Epilogue, GlobalStatistics, Running
from tests.support.gpu import CUTS, DEVICES, cut_small, run_on, skip_without
from tests.support.interpreter import INTERPRETED
from tests.training import batches, same, train

pytestmark = INTERPRETED

EPS = 1e-5
FREE = {"empty", "empty_like", "new_empty", "view", "slice", "select", "detach", "alias", "_unsafe_view", "as_strided"}
"""Operations of ATen that launch nothing."""


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "FEW_VALUES", 0)  # small layers that share nothing would use torch's


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request.param)


@pytest.fixture(params=CUTS)
def cut(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from cut_small(request.param)


class Seen(TorchDispatchMode):
    """Notes the operations that may launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched, as it goes on."""
    names: list[str] = []
    real = moments.launch

    def noting(kernel, grid, *arguments):
        names.append(kernel.__name__)
        real(kernel, grid, *arguments)

    for module in (moments, apply, cosums, combine):
        monkeypatch.setattr(module, "launch", noting)
    return names


def buffers(channels: int, device: str) -> Running:
    mean, var = torch.rand(2, channels, device=device).add(0.5).unbind()
    return Running(mean.clone(), var.clone(), torch.tensor(3, device=device), 0.1)


# --- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_those_of_stock(device: str, cut: str, momentum: float | None) -> None:
    stock = nn.BatchNorm2d(5, momentum=momentum).to(device)
    ours = distnorm.convert(copy.deepcopy(stock), "local_bn")
    for x in batches((3, 5, 4, 3)):
        stock(x.to(device))
        versions = [each._version for each in ours.buffers()]
        ours(x.to(device))
        assert all(each._version > before for each, before in zip(ours.buffers(), versions, strict=True))
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values_change_nothing(device: str, count: int) -> None:
    """One value, or none, over all ranks: NaN, if there is any, must not enter."""
    running = buffers(3, device)
    before = [each.clone() for each in running[:3]]
    x = torch.full((count, 3), float("nan"), device=device)
    shared = torch.tensor([float("nan")] * 6 + [count], dtype=torch.float64, device=device)
    apply.apply(
        *(x, shared, torch.zeros(3, device=device), None, None, None, [], list(running[:3]), None, 0.1, EPS),
        *(1.0, 0, 2, False),
    )
    assert all(torch.equal(now, then) for now, then in zip(running[:3], before, strict=True))


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kinds", [1, 2])
def test_what_completed_at_the_end_of_a_step(device: str, kinds: int, momentum: float | None, weight: float) -> None:
    running = buffers(200, device)._replace(momentum=momentum)
    mean, var, updates = (each.clone() for each in running[:3])
    local_mean, local_var = torch.rand(2, 200, dtype=torch.float64, device=device).unbind()
    rows = [local_mean, local_var + local_mean.square()] if kinds == 2 else [local_var]
    total, completed = (torch.tensor(each, dtype=torch.float64, device=device) for each in (9.0, weight))
    method = distnorm.methods.BatchNorm() if kinds == 2 else RMS()
    gpu_pass.update_from_means(method.formula(), GlobalStatistics("layer", torch.cat(rows), total, completed), running)
    rate = weight * (0.1 if momentum is not None else 1 / 4)
    wanted = local_var * 9 / 8 if kinds == 2 else local_var
    torch.testing.assert_close(running.var_C, var.lerp(wanted.float(), rate))
    torch.testing.assert_close(running.mean_C, mean.lerp(local_mean.float(), rate) if kinds == 2 else mean)
    assert running.updates == updates + int(weight)


@pytest.mark.parametrize("updates", [4, 5])
def test_the_correction_of_rms_begins_on_the_device(device: str, updates: int) -> None:
    method = RMS(clip=1.1, clip_after=5)
    x, weight, bias = (torch.rand(size, device=device).add(0.5).requires_grad_() for size in ((4, 3, 5), 3, 3))
    affine = Affine(weight, bias, EPS, torch.full((3,), 0.9, device=device), torch.tensor(updates, device=device))
    formula = method.formula(affine._replace(updates=torch.tensor(9, device=device)))
    kernels = gpu_pass.GpuPass(formula._replace(updates=affine.updates), EPS)
    y = method.normalize(x, KeepLocal(), layer_of(affine))
    dy = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
    expected = torch.autograd.grad(y, [x, weight, bias], dy)
    with torch.no_grad():
        ours = kernels.normalize(x, kernels.sums(x), weight, bias, Epilogue(), None)
        cotangents, dweight, dbias, _ = kernels.pull(dy, x, None, weight)
        dx = kernels.combine(dy, x, cotangents)
    for value, wanted in zip([ours, dx, dweight, dbias], [y, *expected], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


# --- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", ["", "relu", "residual, relu"])
def test_launches_of_a_layer(
    device: str, cut: str, launches: list[str], epilogue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By construction at most 3 and 3, beside the collectives; nothing of ATen's but memory and views."""
    monkeypatch.setattr(dispatch_state, "has_dispatch_mode", lambda: False)  # the layer runs as if nobody looked on
    layer = distnorm.convert(nn.BatchNorm2d(2), "sync_bn").to(device)
    x, residual = (torch.randn(4, 2, 6, 6, device=device, requires_grad=True) for _ in range(2))
    added = residual if "residual" in epilogue else None
    layer(x).backward(torch.randn_like(x))  # binds
    dy = torch.randn_like(x)
    launches.clear()
    with Seen() as forward:
        y = layer(x, residual=added, relu="relu" in epilogue)
    split = cut == "cut"
    assert launches == ["sums_kernel", *["merge_kernel"] * split, "apply_kernel"]
    assert forward.names == ["gpu_moments", "gpu_apply"]
    launches.clear()
    with Seen() as backward:
        torch.autograd.grad(y, [x, layer.weight, layer.bias, *[residual] * (added is not None)], dy)
    assert launches == ["cosums_kernel", *["pull_kernel"] * split, "combine_kernel"]
    assert backward.names == ["gpu_cosums", "gpu_combine"]


# --- whole models --------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )


@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recipe", ["local_bn", "sync_bn"])
def test_training_is_that_of_stock(device: str, recipe: str, memory_format: torch.memory_format, fuse: bool) -> None:
    stock = network().to(device, memory_format=memory_format)
    inputs = [each.to(device, memory_format=memory_format) for each in batches((3, 2, 7, 7), 2)]
    ours = distnorm.convert(copy.deepcopy(stock), recipe, fuse=fuse)
    given, expected = train(ours, inputs), train(stock, inputs)
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text)


def test_moving_statistics_train_as_on_the_plain_path(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [each.to(device) for each in batches((3, 2, 7, 7), 3)]
    traces = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(normalize, "suits", lambda *_: False)
        traces.append(train(distnorm.convert(network().to(device), "mabn"), inputs))
    for name, value in traces[1].items():
        torch.testing.assert_close(
            traces[0][name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text
        )


def test_one_value_is_told_where_the_shape_tells_it(device: str) -> None:
    layer = distnorm.convert(nn.BatchNorm1d(3), "sync_bn").to(device)
    with pytest.raises(ValueError, match="1 value per channel"):
        layer(torch.randn(1, 3, device=device))


def test_which_inputs_the_kernels_take(device: str) -> None:
    x = torch.zeros(2, 3, device=device)
    assert normalize.suits(RMS(), x)
    assert normalize.suits(RMS(), x.double()) is (device == "cpu")


@pytest.mark.slow
def test_two_ranks_on_one_device(device: str) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.support.gpu_pair"]
    done = subprocess.run([sys.executable, *command, device], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- a card alone knows --------------------------------------------------------------------------


def trained() -> tuple[nn.Module, Tensor, torch.optim.Optimizer]:
    """A model after three steps on the card, with its input and optimizer."""
    model = distnorm.convert(network().cuda(), "sync_bn")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = batches((3, 2, 7, 7), 1)[0].cuda()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().sum().backward()
        optimizer.step()
    return model, x, optimizer


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_never_waits_for_the_card() -> None:
    skip_without("cuda")
    model, x, optimizer = trained()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().sum().backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_is_replayed_from_a_graph() -> None:
    skip_without("cuda")
    model, x, optimizer = trained()
    other, graph = copy.deepcopy(model), torch.cuda.CUDAGraph()

    def step(of: nn.Module, by: torch.optim.Optimizer) -> None:
        by.zero_grad(set_to_none=False)
        of(x).square().sum().backward()
        by.step()

    with torch.cuda.graph(graph):  # records, and runs nothing
        step(model, optimizer)
    for _ in range(2):
        graph.replay()
    same_rate = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(2):
        step(other, same_rate)
    torch.cuda.synchronize()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    same(dict(model.named_buffers()), dict(other.named_buffers()))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Moving(window=3), StaleMix()], ids=str)
def test_a_moving_step_is_replayed_and_ended_outside(policy: Policy) -> None:
    skip_without("cuda")
    models = [distnorm.convert(network().cuda(), Recipe(method=RMS(), policy=policy)) for _ in range(2)]
    x = torch.randn(3, 2, 7, 7, device="cuda")

    def step(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        model(x).square().sum().backward()

    for model in models:
        distnorm.attach(model, manual=True)
        for _ in range(3):
            step(model)
            distnorm.end_step(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(models[0])
    for _ in range(4):
        graph.replay()
        step(models[1])
        for model in models:
            distnorm.end_step(model)
    torch.cuda.synchronize()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    same(dict(models[0].named_buffers()), dict(models[1].named_buffers()))
