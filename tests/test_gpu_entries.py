"""What a GPU is asked to do for policies that remember steps: launches, no waiting, operators, compilation.

That it computes the right thing: tests/moving/test_entries_gpu.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is made for Linux only")

import distnorm
from distnorm import Recipe
from distnorm.compat import dispatch_state
from distnorm.kernels import gpu, windows
from distnorm.kernels.gpu import entries
from distnorm.methods import BatchNorm
from distnorm.policies import Moving, StaleMix
from distnorm.types import EVERY_LAYER, Slot
from tests.moving.conftest import interpret
from tests.moving.test_entries_gpu import EVERY, SIZES, Policy, bind
from tests.support.gpu import run_on
from tests.support.gpu_compile import Absent, compile_launch, driver
from tests.support.interpreter import INTERPRETED
from tests.test_gpu_layers import FREE as VIEWS
from tests.test_gpu_layers import Seen

pytestmark = INTERPRETED

FREE = VIEWS | {"split_with_sizes", "unbind", "_local_scalar_dense", "mul_"}
"""What launches nothing, or stands for a collective; a number of a CPU's."""
SCALES = pytest.mark.parametrize("scale", ["float", "host", "device"])


def scale_of(kind: str, device: str) -> Tensor | float:
    return 2.0 if kind == "float" else torch.full((), 2.0, device="cpu" if kind == "host" else device)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    interpret(monkeypatch)
    yield from run_on("cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    """The names of the kernels that are launched, as it goes on."""
    names: list[str] = []
    real = entries.launch

    def noting(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.__name__)
        real(kernel, *arguments)

    monkeypatch.setattr(entries, "launch", noting)
    return names


def both(reducer: Any, step: int, scale: Tensor | float, device: str) -> None:
    """A forward and a backward of every layer."""
    for (layer, direction, _), size in SIZES.items():
        if direction == "forward":
            shared = reducer.reduce(
                torch.ones(size + 1, dtype=torch.float64, device=device), Slot(layer, direction, step)
            )
        else:
            slot = Slot(layer, direction, step, forward_count=shared[-1], loss_scale=scale)
            answer = reducer.reduce(torch.ones(size, dtype=torch.float64, device=device), slot)
            assert (answer.device, answer.dtype, answer.shape) == (shared.device, torch.float64, (size,))


# --- launches ------------------------------------------------------------------------------------


@SCALES
@pytest.mark.parametrize(
    ("policy", "operator"),
    [
        (Moving(window=3), "window"),
        (Moving(window=3, loss_reduction="sum"), "window"),
        (StaleMix(), "mix"),
    ],
    ids=["mean", "sum", "mix"],
)
def test_one_launch_per_layer_and_direction(
    device: str, launches: list[str], policy: Policy, operator: str, scale: str
) -> None:
    reducer, factor = bind(policy), scale_of(scale, device)
    with Seen() as seen:
        both(reducer, 0, factor, device)
    assert launches == [f"{operator}_kernel"] * len(SIZES)
    assert [name for name in seen.names if name not in ("ones", "_local_scalar_dense")] == [f"entries_{operator}"] * 4


@pytest.mark.parametrize(("policy", "limit"), [(Moving(window=3), 9), (StaleMix(), 33)], ids=["Moving", "StaleMix"])
def test_the_end_of_a_step_is_for_all_layers_at_once(
    device: str, launches: list[str], policy: Policy, limit: int
) -> None:
    """However many these are; beside the collective."""
    counted = []
    for layers in (1, 5):
        sizes: dict[Any, int] = {
            (str(k), direction, ""): 3 for k in range(layers) for direction in ("forward", "backward")
        }
        reducer = bind(policy, device, sizes)
        for step in range(2):
            launches.clear()
            with Seen() as seen:
                completed = reducer.end_step(Slot(EVERY_LAYER, "forward", step))
        assert len(completed) == layers
        assert launches == ["push_kernel"]
        counted.append([name for name in seen.names if name not in FREE])
    assert counted[0] == counted[1]
    assert len(counted[0]) == limit


@pytest.mark.parametrize("policy", [Moving(window=3), StaleMix()], ids=["Moving", "StaleMix"])
def test_launches_of_a_layer(device: str, launches: list[str], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the kernels of the method one of the policy, and nothing else but memory and views."""
    monkeypatch.setattr(dispatch_state, "has_dispatch_mode", lambda: False)  # the layer runs as if nobody looked on
    layer = distnorm.convert(nn.BatchNorm2d(2), Recipe(method=BatchNorm(), policy=policy))
    distnorm.attach(layer, manual=True)
    x, dy = torch.randn(2, 4, 2, 6, 6).unbind()
    x.requires_grad_()
    layer(x).backward(dy)  # binds
    launches.clear()
    with Seen() as forward:
        y = layer(x)
    assert (len(launches), len(forward.names)) == (1, 3)
    with Seen() as backward:
        torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    assert (len(launches), len(backward.names)) == (2, 3)
    operator = "entries_window" if isinstance(policy, Moving) else "entries_mix"
    assert forward.names[1] == backward.names[1] == operator


# --- waiting -------------------------------------------------------------------------------------


class Methods(TorchFunctionMode):
    """Methods as operators, for a device that this torch may not be built for; refuses indices that make it wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return item(*args)
        if func is Tensor.__setitem__:
            x, index, value = args
            assert isinstance(value, Tensor), "a number that is assigned is copied from the host, which waits"
            return torch.ops.aten.index_put_(x, list(index), value)
        if func in (Tensor.to, Tensor.double):
            x, to = (*args, torch.float64)[:2]
            place = {"dtype": to} if isinstance(to, torch.dtype) else {"device": torch.device(to)}
            return torch.ops.aten._to_copy(x, **place)
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        return (torch.logical_not if func is Tensor.__invert__ else func)(*args, **kwargs or {})


def item(x: Tensor, index: Any) -> Tensor:
    if isinstance(index, int):
        return x.select(0, index)
    if isinstance(index, slice):
        start, stop, _ = index.indices(len(x))
        return x.narrow(0, start, stop - start)
    indices = list(index) if isinstance(index, tuple) else [index]
    assert all(each.dtype == torch.int64 for each in indices), "how many a mask takes, the device must tell"
    found: Tensor = torch.ops.aten.index(x, indices)
    return found


class NoCopies(TorchDispatchMode):
    """Refuses copies from one device to another."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func.overloadpacket.__name__ in ("copy_", "_to_copy"):
            source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
            assert source.device == found.device, "a copy between devices"
        return found


def zeros_on_card(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device="cuda")


def on_card(reducer: Any) -> Any:
    """The reducer, as if it had been bound to a CUDA device."""
    for holder in (reducer, reducer.bucket, reducer.entries):
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                setattr(holder, name, zeros_on_card(value))
            elif isinstance(value, windows.Slots):
                setattr(holder, name, windows.Slots(*map(zeros_on_card, value)))
    return reducer


@pytest.fixture
def fake() -> Iterator[None]:
    """A CUDA device whose tensors have no values: what needs one raises."""
    with FakeTensorMode(), Methods():
        yield


@EVERY
@pytest.mark.parametrize("scale", ["float", "device"])
@pytest.mark.parametrize("kernels", ["triton", "aten"])
def test_a_step_never_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, fake: None, policy: Policy, scale: str, kernels: str
) -> None:
    monkeypatch.setattr(gpu, "available", lambda: kernels == "triton")
    reducer, factor = on_card(bind(policy)), scale_of(scale, "cuda")
    with NoCopies(), Seen() as seen:
        for step in range(4):
            both(reducer, step, factor, "cuda")
            completed = reducer.end_step(Slot(EVERY_LAYER, "forward", step, passes=step))
            observing = (
                Slot("a", "forward", step),
                Slot("a", "backward", step, forward_count=torch.ones((), device="cuda")),
            )
            for slot, size in zip(observing, (4, 2), strict=True):
                reducer.observe(torch.ones(size, dtype=torch.float64, device="cuda"), slot, 2)
            completed += reducer.end_step(Slot(EVERY_LAYER, "forward", step), observed=True)
    blocking = isinstance(policy, Moving) and not policy.staleness
    assert all(each.means.is_cuda for each in completed) and len(completed) == (0 if blocking else 2)
    ours = {name for name in seen.names if name.startswith("entries_")}
    assert bool(ours) is (kernels == "triton")


def test_what_waits_is_noticed(fake: None) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises(RuntimeError):
        bool(x[0] > 0)
    with pytest.raises(AssertionError, match="assigned"):
        x[-1] = 2.0
    with pytest.raises(AssertionError, match="mask"):
        x[x > 0]
    with NoCopies(), pytest.raises(AssertionError, match="between devices"):
        x.to("cpu")


@pytest.mark.parametrize("module", ["distnorm", "distnorm.cli.main, distnorm.run, distnorm.nn"])
def test_importing_imports_neither_triton_nor_what_takes_long(module: str) -> None:
    """Dynamo imports Triton, before anybody could choose its interpreter; DTensor imports sympy: half a second."""
    slow = "triton", "torch._dynamo", "torch.distributed.tensor", "sympy"
    command = f"import sys, {module}; print([each for each in {slow} if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "[]\n"


# --- operators -----------------------------------------------------------------------------------


def arguments(
    scale: Tensor | None, weight: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[Any, tuple[Any, ...]]]:
    """Two slots of 300 values and 3; the second one's calls."""
    torch.manual_seed(0)
    given = {name: torch.rand(size, dtype=torch.float64) for name, size in (("newest", 4), ("sums", 303), ("out", 306))}
    filled, starts = torch.tensor([2, 1]), torch.tensor([0, 300, 303])
    ring = torch.rand(3, 303, dtype=torch.float64)
    calls = {
        entries.window: (given["newest"], weight, scale, 2.0, given["sums"], filled, given["out"], 300, 3, 1, True),
        entries.mix: (given["newest"][:3], scale, 2.0, given["sums"], given["out"], 300, 1),
        entries.push: (given["out"], starts, ring, filled, filled + 0, given["sums"], filled + 0),
    }
    return given, calls


@pytest.mark.parametrize("scale", [None, torch.tensor(0.3)], ids=["number", "tensor"])
def test_operators_say_what_they_do(device: str, scale: Tensor | None) -> None:
    """Schemas and fakes, by torch's own check."""
    for operator, given in arguments(scale, torch.tensor(2.0).double())[1].items():
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def compile_wide(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    """Numbers of Python's become float32 unless a kernel says otherwise."""
    compile_launch(kernel, grid, *arguments)
    assert "fp32" not in kernel.warmup(*arguments, grid=grid, num_warps=4).src.signature.values()


def compile_all() -> None:
    """Every variant of every kernel."""
    driver.set_active(Absent())
    entries.launch = compile_wide
    for scale, weight in ((None, None), (torch.tensor(0.3), torch.tensor(2.0).double())):
        for operator, given in arguments(scale, weight)[1].items():
            operator(*given)


def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    """By Triton's compiler and NVIDIA's assembler, which need no card."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "from tests.test_gpu_entries import compile_all; compile_all()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["window_kernel", "mix_kernel", "push_kernel"] * 2
    assert not any("spills" in line for line in lines), done.stdout
