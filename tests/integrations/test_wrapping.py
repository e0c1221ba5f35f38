"""Who is converted when, whose steps count, and what is said about it: in one process, on the real hooks."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.optim import optimizer as torch_optimizer

import distnorm
from distnorm.attach import conversions_of
from distnorm.binding import Conversion
from distnorm.integrations import job as job_module
from distnorm.integrations.job import Job, WatchedSettings
from distnorm.integrations.wrapping import install
from distnorm.settings import Settings

MABN = Settings(recipe="mabn", options={"warmup": 2, "window": 3, "weights": "none"})


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is patched comes back; reports at exit are called by the tests."""
    for kind in (DistributedDataParallel, Optimizer, GradScaler, Conversion):
        monkeypatch.setattr(kind, "__init__", kind.__init__)
    hooks = torch_optimizer._global_optimizer_pre_hooks
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_pre_hooks", type(hooks)(hooks))
    monkeypatch.setattr(job_module.atexit, "register", lambda _: None)
    monkeypatch.setattr("distnorm.integrations.wrapping.when_imported", lambda *_: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _converted(settings: Settings = MABN) -> tuple[Job, nn.Sequential]:
    """A model as a wrapper would get it, in a process without a group."""
    job, model = install(settings), _net()
    assert WatchedSettings.of_job(job, follow=True).convert(model)
    return job, model


def _backward(model: nn.Module, times: int = 1, scale: float = 1.0) -> None:
    for _ in range(times):
        (scale * model(torch.randn(5, 3)).square().mean()).backward()


def _steps(model: nn.Module) -> int:
    (conversion,) = conversions_of(model)
    return conversion.bound().step


# --- whose steps count ---------------------------------------------------------------------------


def test_backward_passes_count_where_no_optimizer_is() -> None:
    _, model = _converted()
    _backward(model, 3)
    assert _steps(model) == 3


@pytest.mark.parametrize("early", [True, False])
def test_an_optimizers_steps_count_from_the_first_on(early: bool) -> None:
    job, model = install(MABN), _net()
    optimizer = SGD(model.parameters(), lr=0.1) if early else None
    WatchedSettings.of_job(job, follow=True).convert(model)
    optimizer = optimizer or SGD(model.parameters(), lr=0.1)
    for steps in range(1, 6):
        _backward(model, 3)
        optimizer.step()
        assert _steps(model) == steps


def test_the_trajectory_is_that_of_attach() -> None:
    """Accumulating, through warm-up and on: bit for bit what the script would get by calling attach itself."""
    ends = []
    for by_hand in (True, False):
        if by_hand:
            model = distnorm.convert(_net(), MABN.build())
            optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
            distnorm.attach(model, optimizer=optimizer)
        else:
            _, model = _converted()
            optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(8):
            optimizer.zero_grad()
            _backward(model, 2)
            optimizer.step()
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_optimizer_that_comes_late_takes_over() -> None:
    _, model = _converted()
    _backward(model, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        _backward(model, 2)
        optimizer.step()
    assert _steps(model) == 5


@pytest.mark.parametrize("head_first", [True, False])
def test_of_two_optimizers_that_take_turns_the_one_of_the_norms_counts(head_first: bool) -> None:
    _, model = _converted()
    body, head = Adam(model[:2].parameters()), Adam(model[2].parameters())
    for step in range(9):
        _backward(model)
        if not head_first:
            body.step()
        if step % 3 == 0:
            head.step()
        if head_first:
            body.step()
    assert _steps(model) == 9


def test_an_optimizer_that_steps_more_often_than_the_one_of_the_norms_counts_in_its_place() -> None:
    _, model = _converted()
    body, head = Adam(model[:2].parameters()), Adam(model[2].parameters())
    for step in range(6):
        _backward(model)
        head.step()
        if step % 3 == 2:
            body.step()
    assert _steps(model) == 6 - 1  # its second step in a row told


def test_a_frozen_norm_counts_the_steps_of_what_is_trained() -> None:
    _, model = _converted()
    head = Adam(model[2].parameters())
    for _ in range(3):
        _backward(model, 2)
        head.step()
    assert _steps(model) == 3


def test_a_new_optimizer_takes_over_from_one_that_rests() -> None:
    _, model = _converted()
    first = Adam(model[2].parameters())
    for _ in range(3):
        _backward(model)
        first.step()
    second = Adam(model.parameters())
    for _ in range(4):
        _backward(model)
        second.step()
    assert _steps(model) == 3 + 3  # its second step in a row told


def test_a_new_optimizer_takes_over_from_one_that_is_gone_at_once() -> None:
    _, model = _converted()
    for _ in range(2):
        optimizer = Adam(model.parameters())
        for _ in range(3):
            _backward(model, 2)
            optimizer.step()
        del optimizer
    assert _steps(model) == 6


def test_two_models_and_two_optimizers_count_apart() -> None:
    job, first = _converted()
    second = _net()
    WatchedSettings.of_job(job, follow=True).convert(second)
    of_first, of_second = Adam(first.parameters()), Adam(second.parameters())
    for step in range(6):
        _backward(first)
        _backward(second)
        of_first.step()
        if step % 3 == 2:
            of_second.step()
    assert (_steps(first), _steps(second)) == (6, 2)


def test_optimizers_of_single_parameters_inside_of_backward_passes_leave_steps_to_those() -> None:
    _, model = _converted()
    optimizers = {parameter: SGD([parameter], lr=0.1) for parameter in model.parameters()}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    _backward(model, 4)
    assert _steps(model) == 4


def test_an_optimizer_of_something_else_changes_nothing() -> None:
    _, model = _converted()
    other = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    _backward(model, 2)
    other.step()
    assert _steps(model) == 2


def test_a_model_that_an_engine_drives_is_not_followed() -> None:
    job, model = install(MABN), _net()
    WatchedSettings.of_job(job, follow=False).convert(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    _backward(model, 2)
    optimizer.step()
    assert _steps(model) == 2


# --- loss scales ---------------------------------------------------------------------------------


def _scale(model: nn.Module) -> Tensor | float | None:
    (conversion,) = conversions_of(model)
    return None if conversion.loss_scale is None else conversion.loss_scale()


@pytest.mark.parametrize("early", [True, False])
def test_the_scale_is_the_scalers(early: bool) -> None:
    job, model = install(MABN), _net()
    scaler = GradScaler("cpu", init_scale=8.0) if early else None
    WatchedSettings.of_job(job, follow=True).convert(model)
    scaler = scaler or GradScaler("cpu", init_scale=8.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    assert _scale(model) == 8.0
    scaler.scale(model(torch.randn(5, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update(4.0)
    assert _scale(model) == 4.0 and _steps(model) == 1


def test_a_disabled_scaler_is_none() -> None:
    _, model = _converted()
    scaler = GradScaler("cpu", enabled=False)
    assert _scale(model) is None
    assert not scaler.is_enabled()


def test_several_scalers_are_an_error_with_a_remedy() -> None:
    _, model = _converted()
    scalers = [GradScaler("cpu"), GradScaler("cpu")]
    with pytest.raises(RuntimeError, match=r"2 gradient scalers.*distnorm.attach\(model"):
        _backward(model)
    del scalers[0]
    assert _scale(model) == 65536.0


# --- what is converted, and what is said ---------------------------------------------------------


class _Wrapper(DistributedDataParallel):
    """A framework's subclass."""

    def __init__(self, module: nn.Module, **options: object) -> None:
        super().__init__(module=module, **options)


@pytest.mark.parametrize("kind", [DistributedDataParallel, _Wrapper])
def test_ddp_converts_before_it_looks_at_the_model(kind: type[DistributedDataParallel], world: None) -> None:
    signature = inspect.signature(DistributedDataParallel.__init__)
    install(Settings(recipe="local_bn"))
    assert inspect.signature(DistributedDataParallel.__init__) == signature
    wrapped = kind(module=_net())
    assert type(wrapped.module[1]) is distnorm.DistNorm1d
    assert list(wrapped.named_module_buffers) == []  # the list of what DDP must not broadcast came in time


def test_a_script_that_converts_by_itself_is_left_alone(world: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = install(MABN)
    model = distnorm.convert(_net(), "mabn", window=5)
    optimizer = SGD(model.parameters(), lr=0.1)
    DistributedDataParallel(model)
    assert model[1].recipe.name == "mabn(window=5)"
    _backward(model, 2)
    optimizer.step()
    assert _steps(model) == 2
    job._report()
    assert capsys.readouterr().err == ""


def test_one_process_is_told_so_once(world: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = install(Settings())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [DistributedDataParallel(_net()) for _ in range(2)]
    (warning,) = caught
    assert "this job has 1 process" in str(warning.message) and "torchrun --nproc_per_node" in str(warning.message)
    assert warning.filename == __file__
    job._report()
    assert capsys.readouterr().err == "distnorm.run: Sequential: 1 layers converted to sync_bn\n" * len(models)


def test_a_model_without_batch_norm_is_named_once(world: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = install(Settings())
    with pytest.warns(UserWarning, match=r"^distnorm.run: Linear has no batch norm layer to convert.$") as caught:
        DistributedDataParallel(nn.Linear(2, 2))
    assert len(caught) == 1 and caught[0].filename == __file__
    job._report()
    assert capsys.readouterr().err == ""


def test_a_script_that_wraps_nothing_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = install(MABN)
    job._report()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distnorm.run: warning: nothing was converted.")
    assert "DistributedDataParallel, FSDP (fully_shard) or DeepSpeed" in line
    assert line.endswith("or call distnorm.convert(model, 'mabn') in the script.")


@pytest.mark.parametrize("reason", ["failed", "not the first rank", "fork", "converts by itself"])
def test_nobody_else_is_told(reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "not the first rank":
        monkeypatch.setenv("RANK", "1")
    job = install(MABN)
    job.failed = reason == "failed"
    if reason == "fork":
        monkeypatch.setattr(os, "getpid", lambda: -1)
    if reason == "converts by itself":
        distnorm.convert(_net(), "sync_bn")
    job._report()
    assert capsys.readouterr().err == ""


def test_parts_that_became_a_whole_are_announced_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    """As FSDP2 does: each call undoes the conversions of the parts, and converts the whole."""
    from distnorm.convert import undo

    job = install(Settings(recipe="local_bn", ledger=True))
    settings = WatchedSettings.of_job(job, follow=True)
    part, rest = _net(), _net()
    settings.convert(part)
    undo(part)
    whole = nn.ModuleList([part, rest])
    settings.convert(whole)
    optimizer = SGD(whole.parameters(), lr=0.1)
    _backward(part, 2)
    _backward(rest, 2)
    optimizer.step()
    assert _steps(whole) == 1
    job._report()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("distnorm.run")] == [
        "distnorm.run: ModuleList: 2 layers converted to local_bn",
        "distnorm.run: ledger of ModuleList",
    ]
