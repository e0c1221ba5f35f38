"""Private parts of torch that the package stands on: each is pinned by what the package needs of it.

A failure here says what torch has changed, and which module has to follow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from types import CodeType
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Variable, forward_ad
from torch.distributed import distributed_c10d
from torch.distributed.algorithms.join import Join
from torch.jit._script import call_prepare_scriptable_func
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from distnorm.autograd import engine
from distnorm.compat import dispatch_state
from distnorm.layers import ddp
from distnorm.transport.make_group import make_group
from tests.support.pool import Pool

TIMEOUT = timedelta(seconds=77)


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _task() -> int:
    return torch._C._current_graph_task_id()


# --- boundary: autograd's engine -----------------------------------------------------------------


def test_the_graph_task_is_known_inside_backward_only() -> None:
    x = torch.ones(2, requires_grad=True)
    seen: list[int] = []
    x.register_hook(lambda dx: seen.append(_task()))
    assert _task() == -1
    (2 * x).sum().backward()
    (3 * x).sum().backward()
    assert _task() == -1
    assert len(set(seen)) == 2 and min(seen) >= 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_graph_task_is_known_in_a_recomputation(reentrant: bool) -> None:
    seen: list[int] = []

    def run(x: Tensor) -> Tensor:
        seen.append(_task())
        return x.exp()

    checkpoint(run, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert seen[0] == -1 and len(seen) == 2 and seen[1] >= 0


def test_the_graph_task_is_unset_after_an_error() -> None:
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda dx: {}["nothing"])
    with pytest.raises(KeyError):
        (2 * x).sum().backward()
    assert _task() == -1


class _Queue(torch.autograd.Function):
    """Queue a callback while the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: list[object]) -> Tensor:
        ctx.calls = calls
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        Variable._execution_engine.queue_callback(lambda: ctx.calls.append("end"))
        return dx, None


def test_a_queued_callback_runs_once_after_the_last_gradient() -> None:
    calls: list[object] = []
    x = torch.ones(2, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda _: calls.append("gradient"))
    y = _Queue.apply(x.exp().exp(), calls).sum()
    y.backward(retain_graph=True)
    assert calls == ["gradient", "end"]
    y.backward()
    assert calls == ["gradient", "end"] * 2
    (2 * x).sum().backward()
    assert calls[4:] == ["gradient"]


def test_a_callback_queued_by_a_recomputation_runs_after_the_outer_pass() -> None:
    calls: list[object] = []
    x = torch.ones(2, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda _: calls.append("gradient"))

    def run(value: Tensor) -> Tensor:
        if _task() != -1:
            Variable._execution_engine.queue_callback(lambda: calls.append("end"))
        return value.exp()

    checkpoint(run, 2 * x, use_reentrant=True).sum().backward()
    assert calls == ["gradient", "end"]


def test_a_callback_cannot_be_queued_outside() -> None:
    with pytest.raises(RuntimeError, match="during backward pass"):
        Variable._execution_engine.queue_callback(lambda: None)


def _callers() -> list[CodeType]:
    frame, found = sys._getframe(1), []
    while frame is not None:
        found.append(frame.f_code)
        frame = frame.f_back
    return found


class _Noting(torch.autograd.Function):
    """Notes the calls that lead to its backward."""

    seen: ClassVar[list[CodeType]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        _Noting.seen[:] = _callers()
        return dx


def test_backward_passes_call_functions_by_known_names() -> None:
    x = torch.ones(2, requires_grad=True)
    seen: list[CodeType] = []
    y = _Noting.apply(x)
    y.register_hook(lambda dy: seen.extend(_callers()))
    y.sum().backward()
    assert engine._ENGINE in _Noting.seen and engine._FUNCTION in _Noting.seen
    assert _Noting.seen.index(engine._FUNCTION) < _Noting.seen.index(engine._ENGINE)
    assert engine._ENGINE in seen and engine._FUNCTION not in seen


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_and_a_hook_does_not(reentrant: bool) -> None:
    seen: list[bool] = []

    def run(x: Tensor) -> Tensor:
        seen.append(engine.repeating())
        return x.exp()

    y = checkpoint(run, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
    y.register_hook(lambda dy: seen.append(engine.repeating()))
    y.sum().backward()
    assert seen == [False, False, True]


def test_the_apply_below_that_of_functions_makes_the_same_node() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 2 * dy

    x = torch.ones(2, requires_grad=True)
    for apply in (Double.apply, engine.bare_apply(Double)):
        y = apply(x)
        assert type(y.grad_fn).__name__ == "DoubleBackward"
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2, 2]


# --- surroundings: modes and transforms ----------------------------------------------------------


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def test_dispatch_modes_are_counted_and_can_be_hidden() -> None:
    assert not dispatch_state.has_dispatch_mode()
    for mode in (_Mode(), FakeTensorMode()):
        with mode:
            assert dispatch_state.has_dispatch_mode()
            with dispatch_state.modes_disabled():
                assert not dispatch_state.has_dispatch_mode()
                assert type(torch.ones(1)) is Tensor
            assert dispatch_state.has_dispatch_mode()


def test_transforms_are_known_and_can_be_hidden() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(dispatch_state.in_transform())
        with dispatch_state.modes_disabled():
            seen.append(dispatch_state.in_transform())
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [True, False] * 2
    assert not dispatch_state.in_transform()
    with forward_ad.dual_level():
        assert dispatch_state.in_transform()
    assert not dispatch_state.in_transform()


def test_tensors_that_a_transform_leaves_behind_are_known() -> None:
    left: list[Tensor] = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(torch.ones(2))
    assert type(left[0]) is Tensor and not dispatch_state.are_plain(left[0])
    assert dispatch_state.are_plain(torch.ones(2))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_are_known(strict: bool) -> None:
    """And told from other compilation."""

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if dispatch_state.exporting() else x + 2

    x = torch.zeros(2)
    assert torch.export.export(Layer(), (x,), strict=strict).module()(x).tolist() == [1, 1]
    assert torch.compile(Layer(), backend="eager", fullgraph=True)(x).tolist() == [2, 2]
    assert not dispatch_state.exporting()


def test_batches_of_gradients_are_known() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda dy: seen.append(dispatch_state.is_batch(dy)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_what_is_made_unseen_is_no_inference_tensor() -> None:
    with torch.inference_mode(), dispatch_state.modes_disabled():
        assert not torch.ones(1).is_inference()


# --- rendezvous: the store, and a group's timeout ------------------------------------------------


def test_the_default_store_keeps_texts(world: dist.ProcessGroup) -> None:
    store = distributed_c10d._get_default_store()
    assert [store.add("serial", 1) for _ in range(2)] == [1, 2]
    store.set("key", "text")
    store.wait(["key", "serial"], timedelta(seconds=1))
    assert store.get("key") == b"text"
    store.set("other key", "other text")
    assert store.multi_get(["other key", "key"]) == [b"other text", b"text"]
    assert store.check(["key"]) and not store.check(["other"])
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        store.wait(["other"], timedelta(milliseconds=10))


def test_the_timeout_of_a_group_can_be_read(world: dist.ProcessGroup) -> None:
    assert "cpu" in [device.type for device in world._device_types]
    for device in world._device_types:
        assert world._get_backend(device).options._timeout == TIMEOUT
    assert isinstance(distributed_c10d.default_pg_timeout, timedelta)


def test_a_group_can_be_made_by_its_members(world: dist.ProcessGroup) -> None:
    group = dist.new_group([0], timeout=TIMEOUT, use_local_synchronization=True)
    assert dist.get_process_group_ranks(group) == [0]
    assert dist.get_backend(group) == "gloo"


def test_a_group_is_one_object_for_as_long_as_it_lives(world: dist.ProcessGroup) -> None:
    assert dist.group.WORLD is world
    assert len({world, dist.group.WORLD}) == 1  # bindings compare by identity, known groups are kept by weak keys
    assert not isinstance(dist.GroupMember.NON_GROUP_MEMBER, dist.ProcessGroup)


# --- ddp: the buffers that it broadcasts ---------------------------------------------------------


class Look(nn.Module):
    """Notes which DDP modules' forwards it is in: what torch knows, and what the stack says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("own", torch.zeros(1))
        self.seen: list[list[DistributedDataParallel]] = []

    @torch.compiler.disable  # as our operators run
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append([DistributedDataParallel._active_ddp_module, *ddp._enclosing()])
        return x * self.weight


def test_the_ddp_modules_of_a_forward_are_known(world: dist.ProcessGroup) -> None:
    look = Look()
    inner = DistributedDataParallel(look)
    outer = DistributedDataParallel(nn.Sequential(inner, nn.Linear(1, 1)))
    for module in (inner, outer, torch.compile(outer, backend="eager")):
        module(torch.ones(2, 1))
    assert look.seen == [[inner, inner], [inner, inner, outer], [inner, inner, outer]]
    assert DistributedDataParallel._active_ddp_module is None


def test_ddp_lists_the_parameters_that_it_reduces(world: dist.ProcessGroup) -> None:
    model = nn.Linear(2, 2)
    wrapped = DistributedDataParallel(model)
    model.extra = nn.Parameter(torch.ones(1))
    assert [id(each) for each in wrapped._module_parameters] == [id(model.weight), id(model.bias)]


@pytest.mark.parametrize("throw", [False, True])
def test_ddp_says_under_which_join_it_runs(world: dist.ProcessGroup, throw: bool) -> None:
    wrapped = DistributedDataParallel(nn.Linear(1, 1))
    assert not wrapped._join_config.enable
    Join([wrapped], throw_on_early_termination=throw)
    assert wrapped._join_config.enable
    assert wrapped._join_config.throw_on_early_termination is throw
    wrapped.join(enable=False)
    assert not wrapped._join_config.enable


def test_names_that_ddp_ignores_can_be_added_and_taken_away(world: dist.ProcessGroup) -> None:
    wrapped = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    names = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(wrapped.named_module_buffers) == names
    assert wrapped.will_sync_module_buffers()
    wrapped.parameters_to_ignore |= set(names)
    wrapped._assign_modules_buffers()
    assert not wrapped.modules_buffers and not wrapped.will_sync_module_buffers()
    wrapped.parameters_to_ignore -= {names[0]}
    wrapped(torch.randn(3, 2))  # assigns them again before it broadcasts
    wrapped._assign_modules_buffers()
    assert list(wrapped.named_module_buffers) == names[:1]


def test_ddp_reads_the_users_list_when_it_is_made(world: dist.ProcessGroup) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model._ddp_params_and_buffers_to_ignore = ["1.running_mean", "1.running_var"]
    wrapped = DistributedDataParallel(model)
    assert wrapped.parameters_to_ignore == {"1.running_mean", "1.running_var"}
    assert list(wrapped.named_module_buffers) == ["1.num_batches_tracked"]


# --- convert and module: torch's batch norm classes ----------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_batch_norm_has_one_base(kind: type[nn.Module]) -> None:
    layer = kind(3)
    assert isinstance(layer, _BatchNorm)
    assert {"running_mean", "running_var", "num_batches_tracked"} == set(dict(layer.named_buffers()))
    assert callable(layer._check_input_dim)
    assert not issubclass(nn.InstanceNorm2d, _BatchNorm)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("kind", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
def test_lazy_layers_are_known_by_their_mixin(kind: type[nn.Module]) -> None:
    layer = kind()
    assert isinstance(layer, LazyModuleMixin) and isinstance(layer, _BatchNorm)
    layer(torch.randn(4, 3, 2, 2, 2)[(..., *(0,) * (3 - int(kind.__name__[-2])))])
    assert type(layer) is getattr(nn, kind.__name__.removeprefix("Lazy"))


def test_modules_apply_load_and_save_by_these_methods() -> None:
    calls: list[str] = []

    class Watched(nn.BatchNorm2d):
        def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
            calls.append("apply")
            return super()._apply(fn, recurse)

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            calls.append("load")
            super()._load_from_state_dict(state_dict, prefix, *args)

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            calls.append("save")
            super()._save_to_state_dict(destination, prefix, keep_vars)

    model = nn.Sequential(Watched(3))
    model.double()
    model.load_state_dict(model.state_dict())
    assert calls == ["apply", "save", "load"]


# --- class_swap, tracing and module: classes that torch makes, and what its tracers read ----------


def test_parametrized_modules_have_a_class_of_their_own() -> None:
    made = type(parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", nn.Identity()))
    assert made.__bases__ == (nn.BatchNorm2d,) and made.__module__ == parametrize.__name__
    assert made.__name__ == "ParametrizedBatchNorm2d" and not hasattr(parametrize, made.__name__)
    assert isinstance(vars(made)["weight"], property)


def test_scripting_asks_a_module_first_and_puts_what_it_answers_into_the_model() -> None:
    """Why converted layers answer with themselves: another layer would stay in the model that goes on training."""

    class Asked(nn.Identity):
        def __prepare_scriptable__(self) -> nn.Module:
            return nn.ReLU()

    model = nn.Sequential(Asked())
    call_prepare_scriptable_func(model)
    assert type(model[0]) is nn.ReLU


# --- kernels: ATen's batch norm as a loop --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2)])
def test_the_backward_of_inference_gives_both_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Mask [False, True, True]: no dx, but sum(dy (x - mean)) / sqrt(var + eps), and sum(dy)."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weight, mean, var = torch.full((3,), 9.0, dtype=wide), torch.arange(3.0).to(wide), torch.full((3,), 4.0, dtype=wide)
    dx, product, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, var, None, None, False, 0.0, [False, True, True]
    )
    dims = [dim for dim in range(len(shape)) if dim != 1]
    centred = x.double() - mean.double().view(1, -1, *(1,) * (len(shape) - 2))
    assert dx is None or dx.numel() == 0
    assert (product.dtype, total.dtype) == (wide, wide)
    torch.testing.assert_close(product.double(), (dy.double() * centred).sum(dims) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), dy.double().sum(dims), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_inference_is_a_multiply_add_that_takes_wide_parameters(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scale, shift, mean = (torch.arange(3.0).to(wide) + start for start in (0.5, 10, 20))
    y = torch.batch_norm(x, scale, shift, mean, torch.ones(3, dtype=wide), False, 0.0, 0.0, False)
    expected = (x.double() - mean.view(1, 3, 1)) * scale.view(1, 3, 1) + shift.view(1, 3, 1)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_forward_gradients_are_off_inside_of_functions_only() -> None:
    """It tells the first forward of a reentrant checkpoint from one under no_grad."""
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()))
        return x * 1

    x = torch.ones(1, requires_grad=True)
    look(x)
    with torch.no_grad():
        look(x)
    checkpoint(look, x, use_reentrant=True)
    assert seen == [(True, True), (False, True), (False, False)]


def test_groups_can_be_made_under_names_of_our_own(pool: Pool) -> None:
    assert pool.run(3, _sum_in_groups_of_our_own) == [1.0, 1.0, 2.0]


def _sum_in_groups_of_our_own(rank: int) -> float:
    """Ranks 0 and 1 have made one more group than rank 2 when all three make one."""
    pair = make_group((0, 1), "pair", timedelta(seconds=10)) if rank < 2 else None
    everyone = make_group((0, 1, 2), "everyone", timedelta(seconds=10))
    assert dist.get_process_group_ranks(everyone) == [0, 1, 2]
    value = torch.tensor(float(rank))
    if pair is not None:
        dist.all_reduce(value, group=pair)
    dist.barrier(everyone)
    return value.item()


# --- surroundings: function modes ----------------------------------------------------------------


def test_function_modes_are_known() -> None:
    assert not dispatch_state.has_function_mode()
    with torch.overrides.BaseTorchFunctionMode():
        assert dispatch_state.has_function_mode()
    assert not dispatch_state.has_function_mode()


# --- surroundings: hooks on all modules ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_are_known(kind: str) -> None:
    layer = nn.ReLU()
    assert dispatch_state.is_unobserved(layer)
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *_: None)
    try:
        assert not dispatch_state.is_unobserved(layer)
    finally:
        handle.remove()
    assert dispatch_state.is_unobserved(layer)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "backward"])
def test_hooks_of_a_module_are_known(kind: str) -> None:
    layer = nn.ReLU()
    handle = getattr(layer, f"register_{kind}_hook")(lambda *_: None)
    assert not dispatch_state.is_unobserved(layer)
    handle.remove()
    assert dispatch_state.is_unobserved(layer)


def test_hooks_on_saved_tensors_are_known_in_checkpoints_and_their_repetitions() -> None:
    seen: list[bool] = []

    def run(x: Tensor) -> Tensor:
        seen.append(dispatch_state.saved_tensors_hooks() is not None)
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert seen == [True, True]
    with torch.autograd.graph.save_on_cpu():
        assert dispatch_state.saved_tensors_hooks() is not None
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert dispatch_state.saved_tensors_hooks() is None
    assert dispatch_state.saved_tensors_hooks() is None
