"""Who is converted when, and what is said about it: in one process, on the real hooks."""

from __future__ import annotations

import inspect
import logging
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import distnorm
from distnorm.integrations.job import WatchedSettings
from distnorm.integrations.wrapping import install
from distnorm.settings import Settings
from tests.integrations.hooked import MABN, backward, net, steps_of

pytestmark = pytest.mark.usefixtures("clean_hooks")


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
    wrapped = kind(module=net())
    assert type(wrapped.module[1]) is distnorm.DistBatchNorm1d
    assert list(wrapped.named_module_buffers)
    wrapped(torch.randn(4, 3))
    assert not list(wrapped.named_module_buffers)


def test_a_script_that_converts_by_itself_is_left_alone(world: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = install(MABN)
    model = distnorm.convert(net(), "mabn", window=5)
    optimizer = SGD(model.parameters(), lr=0.1)
    DistributedDataParallel(model)
    assert model[1].recipe.name == "mabn(window=5)"
    backward(model, 2)
    optimizer.step()
    assert steps_of(model) == 2
    job._report()
    assert capsys.readouterr().err == ""


def test_one_process_is_told_so_once(world: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = install(Settings())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [DistributedDataParallel(net()) for _ in range(2)]
    (warning,) = caught
    assert "this job has 1 process" in str(warning.message) and "torchrun --nproc_per_node" in str(warning.message)
    assert warning.filename == __file__
    job._report()
    assert capsys.readouterr().err == "distnorm.run: Sequential: 1 layers converted to sync_bn\n" * len(models)


def test_it_is_said_by_the_scripts_logging_alone(
    world: None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = install(Settings(recipe="local_bn", fuse=True))
    with caplog.at_level(logging.INFO):
        DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
        job._report()
    ours = [each.getMessage() for each in caplog.records if each.name.startswith("distnorm")]
    assert ours == ["distnorm.run: Sequential: 1 layers converted to local_bn, 1 of them fused with their epilogues"]
    assert capsys.readouterr().err == ""


def test_what_was_fused_is_said(world: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = install(Settings(recipe="local_bn", fuse=True))
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)
    DistributedDataParallel(nn.Sequential(*layers))
    job._report()
    said = capsys.readouterr().err
    assert said == "distnorm.run: Sequential: 2 layers converted to local_bn, 1 of them fused with their epilogues\n"


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
        distnorm.convert(net(), "sync_bn")
    job._report()
    assert capsys.readouterr().err == ""


def test_parts_that_became_a_whole_are_announced_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    """As FSDP2 does: each call undoes the conversions of the parts, and converts the whole."""
    from distnorm.convert import undo

    job = install(Settings(recipe="local_bn", ledger=True))
    settings = WatchedSettings.of_job(job, follow=True)
    part, rest = net(), net()
    settings.convert(part)
    undo(part)
    whole = nn.ModuleList([part, rest])
    settings.convert(whole)
    optimizer = SGD(whole.parameters(), lr=0.1)
    backward(part, 2)
    backward(rest, 2)
    optimizer.step()
    assert steps_of(whole) == 1
    job._report()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("distnorm.run")] == [
        "distnorm.run: ModuleList: 2 layers converted to local_bn",
        "distnorm.run: ledger of ModuleList",
    ]
