"""What DistributedDataParallel broadcasts: everything at its construction, and of layers that train nothing after that.

The reference is torch's batch norm on every rank's own inputs, in one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.nn import SyncBatchNorm
from tests.support.pool import Pool

STEPS = 3


class Net(nn.Module):
    """A backbone with norm, and a head with norm that a forward may skip."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x_NC: Tensor, *, whole: bool = True) -> Tensor:
        h_NC = self.backbone(x_NC)
        return self.head(h_NC) if whole else h_NC


def net() -> Net:
    torch.manual_seed(1)
    return Net().double()


def inputs(rank: int) -> Tensor:
    """[STEPS, 5, 3]; ranks see different distributions."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(STEPS, 5, 3, generator=generator, dtype=torch.float64) * (1 + rank) + 5 * rank


def statistics(model: nn.Module) -> list[Tensor]:
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d)]
    return [value.clone() for norm in norms for value in (norm.running_mean, norm.running_var)]


def own(rank: int) -> list[Tensor]:
    """What rank ``rank`` sees by itself."""
    model = net()
    for x_NC in inputs(rank):
        model(x_NC)
    return statistics(model)


def united() -> list[Tensor]:
    means_and_variances = [torch.stack(each) for each in zip(own(0), own(1), strict=True)]
    expected = []
    for mean_RC, var_RC in zip(means_and_variances[::2], means_and_variances[1::2], strict=True):
        mean_C = mean_RC.mean(0)
        expected += [mean_C, (var_RC + mean_RC.square()).mean(0) - mean_C.square()]
    return expected


def close(ours: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


# --- ways of wrapping ----------------------------------------------------------------------------


def before(model: Net) -> nn.Module:
    return DistributedDataParallel(distnorm.convert(model, "local_bn"))


def after(model: Net) -> nn.Module:
    return distnorm.convert(DistributedDataParallel(model), "local_bn")


def parts(model: Net) -> nn.Module:
    distnorm.convert(model.backbone, "local_bn")
    distnorm.convert(model.head, "local_bn")
    return DistributedDataParallel(model)


def bare_layers(model: Net) -> nn.Module:
    for layer in (model.backbone[1], model.head[1]):
        distnorm.convert(layer, "local_bn")
    return DistributedDataParallel(model)


def within(model: Net) -> nn.Module:
    """One DDP module inside of another one, which has a norm of its own."""
    distnorm.convert(model, "local_bn")
    model.backbone = DistributedDataParallel(model.backbone)
    return DistributedDataParallel(model)


def all_within(model: Net) -> nn.Module:
    """All norms are in the inner one; torch tells of that one only."""
    return DistributedDataParallel(nn.Sequential(before(model), nn.Linear(2, 1).double()))


def compiled(model: Net) -> nn.Module:
    return torch.compile(before(model), backend="eager")


def compiled_within(model: Net) -> nn.Module:
    return DistributedDataParallel(torch.compile(distnorm.convert(model, "local_bn"), backend="eager"))


def wrapped_again(model: Net) -> nn.Module:
    """In a second DDP module, after evaluation in a first."""
    before(model).eval()(inputs(0)[0])
    return DistributedDataParallel(model.train())


def silent(model: Net) -> nn.Module:
    """Rank 0's statistics are taken over when the layers are bound."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(distnorm.convert(model, "local_bn"), broadcast_buffers=False)


WAYS = [before, after, parts, bare_layers, within, all_within, compiled, compiled_within, wrapped_again, silent]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("wrap", WAYS)
def test_ranks_keep_what_they_saw(pool: Pool, wrap: Callable[[Net], nn.Module]) -> None:
    for rank, (kept, evaluated, after_evaluation, joined) in enumerate(pool.run(2, train, wrap)):
        close(kept, own(rank))
        close(after_evaluation, own(rank))
        stock = net().eval()
        for norm, mean_C, var_C in zip(
            (stock.backbone[1], stock.head[1]), own(rank)[::2], own(rank)[1::2], strict=True
        ):
            norm.running_mean, norm.running_var = mean_C, var_C
        close([evaluated], [stock(inputs(rank)[0])])
        close(joined, united())


def train(rank: int, wrap: Callable[[Net], nn.Module]) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Statistics after training, outputs of an evaluation by the wrapper, statistics after it and after their union."""
    model = net()
    wrapped = wrap(model)
    for x_NC in inputs(rank):
        wrapped(x_NC).square().sum().backward()
    kept = statistics(model)
    outputs: list[Tensor] = []
    model.head[1].register_forward_hook(lambda _, __, y_NC: outputs.append(y_NC.detach()))
    wrapped.eval()(inputs(rank)[0])
    evaluated = statistics(model)
    distnorm.sync_running_stats(model)
    return kept, outputs[0], evaluated, statistics(model)


# --- what DDP goes on to broadcast ---------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["sync_bn", "local_bn", "mabn"])
@pytest.mark.parametrize("part", ["", "backbone"])
@pytest.mark.parametrize("late", [False, True], ids=["convert-wrap", "wrap-convert"])
def test_a_checkpoint_of_rank_0_reaches_all(pool: Pool, recipe: str, part: str, late: bool) -> None:
    first, second = pool.run(2, frozen, recipe, part, late)
    close(second, first)
    assert float(second[0][0]) == 7.0


def frozen(rank: int, recipe: str, part: str, late: bool) -> list[Tensor]:
    """Rank 0 loads statistics before the wrapper is made, and others between its forwards."""
    model = net()
    if rank == 0:
        model.backbone[1].running_mean.fill_(2.0)
    if not late:
        distnorm.convert(model.get_submodule(part), recipe)
    wrapped = DistributedDataParallel(model)
    if late:
        distnorm.convert(wrapped.module.get_submodule(part), recipe)
    wrapped.eval()
    assert float(model.backbone[1].running_mean[0]) == 2.0
    for value in (5.0, 7.0):
        if rank == 0:
            model.backbone[1].running_mean.fill_(value)
        wrapped(inputs(rank)[0]).square().sum().backward()
    return statistics(model)


def test_a_frozen_layer_is_broadcast_until_it_trains(pool: Pool) -> None:
    (_, own_head, thawed), (followed, other_head, alone) = pool.run(2, thaw)
    assert followed == [11.0, 12.0]
    assert not torch.equal(own_head, other_head)
    expected = []
    for rank in range(2):
        layer, stem = nn.BatchNorm1d(4).double(), net().backbone[0]
        layer.running_mean.fill_(12.0)
        for x_NC in inputs(rank)[:2]:
            layer(stem(x_NC))
        expected.append(layer.running_mean)
    close([thawed, alone], expected)


def thaw(rank: int) -> tuple[list[float], Tensor, Tensor]:
    """The backbone's norm is frozen at first, while the head's trains."""
    model = net()
    wrapped = DistributedDataParallel(distnorm.convert(model, "local_bn"))
    norm = model.backbone[1].eval()
    followed = []
    for value, x_NC in zip((11.0, 12.0), inputs(rank), strict=False):
        if rank == 0:
            norm.running_mean.fill_(value)
        wrapped(x_NC).square().sum().backward()
        followed.append(float(norm.running_mean[0]))
    head = model.head[1].running_mean.clone()
    norm.train()
    for x_NC in inputs(rank)[:2]:
        wrapped(x_NC).square().sum().backward()
    return followed, head, norm.running_mean


def test_layers_that_only_some_ranks_run_are_settled_with_the_others(pool: Pool) -> None:
    """Else DDP would broadcast lists of different lengths."""
    for rank, (kept, broadcast) in enumerate(pool.run(2, skip)):
        assert broadcast == [["seen"]] * STEPS
        model = net()
        for x_NC in inputs(rank):
            model(x_NC, whole=rank == 0)
        close(kept, statistics(model))


def skip(rank: int) -> tuple[list[Tensor], list[list[str]]]:
    model = distnorm.convert(net(), "local_bn")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    broadcast = []
    for x_NC in inputs(rank):
        wrapped(x_NC, whole=rank == 0).square().sum().backward()
        broadcast.append(list(wrapped.named_module_buffers))
    return statistics(model), broadcast


def explicit_group(model: Net) -> nn.Module:
    groups = [dist.new_group([rank]) for rank in range(2)]
    return DistributedDataParallel(SyncBatchNorm.convert_sync_batchnorm(model, groups[dist.get_rank()]))


def explicit_mesh(model: Net) -> nn.Module:
    return DistributedDataParallel(distnorm.convert(model, "local_bn", mesh=init_device_mesh("cpu", (2,))))


def attached_to_fewer(model: Net) -> nn.Module:
    groups = [dist.new_group([rank]) for rank in range(2)]
    wrapped = DistributedDataParallel(distnorm.convert(model, "sync_bn"))
    distnorm.attach(model, process_group=groups[dist.get_rank()])
    return wrapped


@pytest.mark.parametrize("wrap", [explicit_group, explicit_mesh, attached_to_fewer])
def test_explicit_ranks_leave_buffers_to_ddp(pool: Pool, wrap: Callable[[Net], nn.Module]) -> None:
    assert pool.run(2, broadcast_after_training, wrap) == [sorted(dict(net().named_buffers()))] * 2


def broadcast_after_training(rank: int, wrap: Callable[[Net], DistributedDataParallel]) -> list[str]:
    wrapped = wrap(net())
    for x_NC in inputs(rank):
        wrapped(x_NC).square().sum().backward()
    return sorted(wrapped.named_module_buffers)


def test_models_that_take_turns_have_their_own_lists(pool: Pool) -> None:
    for lists in pool.run(2, take_turns):
        assert lists == [[], ["seen"]] * 2


def take_turns(rank: int) -> list[list[str]]:
    """Two DDP modules for parts of one conversion, as a GAN has them."""
    model = distnorm.convert(
        nn.ModuleList([nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), net()]).double(), "local_bn"
    )
    both = [DistributedDataParallel(each) for each in model]
    lists = []
    for x_NC in inputs(rank)[:2]:
        for wrapped in both:
            wrapped(x_NC).square().sum().backward()
            lists.append(list(wrapped.named_module_buffers))
    return lists


def test_reverted_layers_are_broadcast_again(pool: Pool) -> None:
    for part, whole, copied, followed in pool.run(2, revert):
        assert part == ["backbone.1.running_mean", "backbone.1.running_var"]
        head = [f"head.1.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")]
        assert whole == copied == [*part, *head, "seen"]
        assert followed == 9.0


def revert(rank: int) -> tuple[list[str], list[str], list[str], float]:
    """In two parts, and of a copy; a user ignores one buffer anyway."""
    model = net()
    model._ddp_params_and_buffers_to_ignore = ["backbone.1.num_batches_tracked"]
    wrapped = DistributedDataParallel(distnorm.convert(model, "local_bn"))
    wrapped(inputs(rank)[0]).square().sum().backward()
    copied = deepcopy(wrapped)
    distnorm.revert(model.backbone)
    part = sorted(set(wrapped.named_module_buffers) - {"seen"})
    distnorm.revert(model.head)
    distnorm.revert(copied)
    if rank == 0:
        model.head[1].running_mean.fill_(9.0)
    wrapped.eval()(inputs(rank)[0]).square().sum().backward()
    names = [sorted(each.named_module_buffers) for each in (wrapped, copied)]
    return part, *names, float(model.head[1].running_mean[0])
