"""Whose steps count under the run module, and which loss scale: on the real hooks, in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam

import distnorm
from distnorm.attach import conversions_of
from distnorm.integrations.job import WatchedSettings
from distnorm.integrations.wrapping import install
from tests.integrations.hooked import MABN, backward, converted, net, steps_of
from tests.support.fake import fake_world

pytestmark = pytest.mark.usefixtures("clean_hooks")


# --- whose steps count ---------------------------------------------------------------------------


def test_backward_passes_count_where_no_optimizer_is() -> None:
    _, model = converted()
    backward(model, 3)
    assert steps_of(model) == 3


@pytest.mark.parametrize("early", [True, False])
def test_an_optimizers_steps_count_from_the_first_on(early: bool) -> None:
    job, model = install(MABN), net()
    optimizer = SGD(model.parameters(), lr=0.1) if early else None
    WatchedSettings.of_job(job, follow=True).convert(model)
    optimizer = optimizer or SGD(model.parameters(), lr=0.1)
    for steps in range(1, 6):
        backward(model, 3)
        optimizer.step()
        assert steps_of(model) == steps


@pytest.mark.parametrize("early", [True, False])
def test_layers_with_process_groups_of_their_own_step_with_the_others(
    early: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    job = install(replace(MABN, ledger=True))
    with fake_world(4):
        norms = nn.SyncBatchNorm(4, process_group=dist.new_group([0, 1])), nn.BatchNorm1d(4)
        model = nn.Sequential(nn.Linear(3, 4), *norms, nn.Linear(4, 2))
        optimizer = SGD(model.parameters(), lr=0.1) if early else None
        WatchedSettings.of_job(job, follow=True).convert(model)
        job.announce()
        optimizer = optimizer or SGD(model.parameters(), lr=0.1)
        for steps in range(1, 4):
            for _ in range(2):
                model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            assert [each.bound().step for each in conversions_of(model)] == [steps, steps]
    assert "Sequential: 2 layers converted to mabn" in capsys.readouterr().err


def test_the_trajectory_is_that_of_attach() -> None:
    """Accumulating, through warm-up and on: bit for bit what the script would get by calling attach itself."""
    ends = []
    for by_hand in (True, False):
        if by_hand:
            model = distnorm.convert(net(), MABN.build())
            optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
            distnorm.attach(model, optimizer=optimizer)
        else:
            _, model = converted()
            optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(8):
            optimizer.zero_grad()
            backward(model, 2)
            optimizer.step()
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_optimizer_that_comes_late_takes_over() -> None:
    _, model = converted()
    backward(model, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        backward(model, 2)
        optimizer.step()
    assert steps_of(model) == 5


@pytest.mark.parametrize("head_first", [True, False])
def test_of_two_optimizers_that_take_turns_the_one_of_the_norms_counts(head_first: bool) -> None:
    _, model = converted()
    body, head = Adam(model[:2].parameters()), Adam(model[2].parameters())
    for step in range(9):
        backward(model)
        if not head_first:
            body.step()
        if step % 3 == 0:
            head.step()
        if head_first:
            body.step()
    assert steps_of(model) == 9


def test_an_optimizer_that_steps_more_often_than_the_one_of_the_norms_counts_in_its_place() -> None:
    _, model = converted()
    body, head = Adam(model[:2].parameters()), Adam(model[2].parameters())
    for step in range(6):
        backward(model)
        head.step()
        if step % 3 == 2:
            body.step()
    assert steps_of(model) == 6 - 1  # its second step in a row told


def test_a_frozen_norm_counts_the_steps_of_what_is_trained() -> None:
    _, model = converted()
    head = Adam(model[2].parameters())
    for _ in range(3):
        backward(model, 2)
        head.step()
    assert steps_of(model) == 3


def test_a_new_optimizer_takes_over_from_one_that_rests() -> None:
    _, model = converted()
    first = Adam(model[2].parameters())
    for _ in range(3):
        backward(model)
        first.step()
    second = Adam(model.parameters())
    for _ in range(4):
        backward(model)
        second.step()
    assert steps_of(model) == 3 + 3  # its second step in a row told


def test_a_new_optimizer_takes_over_from_one_that_is_gone_at_once() -> None:
    _, model = converted()
    for _ in range(2):
        optimizer = Adam(model.parameters())
        for _ in range(3):
            backward(model, 2)
            optimizer.step()
        del optimizer
    assert steps_of(model) == 6


def test_two_models_and_two_optimizers_count_apart() -> None:
    job, first = converted()
    second = net()
    WatchedSettings.of_job(job, follow=True).convert(second)
    of_first, of_second = Adam(first.parameters()), Adam(second.parameters())
    for step in range(6):
        backward(first)
        backward(second)
        of_first.step()
        if step % 3 == 2:
            of_second.step()
    assert (steps_of(first), steps_of(second)) == (6, 2)


def test_optimizers_of_single_parameters_inside_of_backward_passes_leave_steps_to_those() -> None:
    _, model = converted()
    optimizers = {parameter: SGD([parameter], lr=0.1) for parameter in model.parameters()}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    backward(model, 4)
    assert steps_of(model) == 4


def test_an_optimizer_of_something_else_changes_nothing() -> None:
    _, model = converted()
    other = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    backward(model, 2)
    other.step()
    assert steps_of(model) == 2


def test_a_model_that_an_engine_drives_is_not_followed() -> None:
    job, model = install(MABN), net()
    WatchedSettings.of_job(job, follow=False).convert(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model, 2)
    optimizer.step()
    assert steps_of(model) == 2


# --- loss scales ---------------------------------------------------------------------------------


def _scale(model: nn.Module) -> Tensor | float | None:
    (conversion,) = conversions_of(model)
    return None if conversion.loss_scale is None else conversion.loss_scale()


@pytest.mark.parametrize("early", [True, False])
def test_the_scale_is_the_scalers(early: bool) -> None:
    job, model = install(MABN), net()
    scaler = GradScaler("cpu", init_scale=8.0) if early else None
    WatchedSettings.of_job(job, follow=True).convert(model)
    scaler = scaler or GradScaler("cpu", init_scale=8.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    assert _scale(model) == 8.0
    scaler.scale(model(torch.randn(5, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update(4.0)
    assert _scale(model) == 4.0 and steps_of(model) == 1


def test_a_disabled_scaler_is_none() -> None:
    _, model = converted()
    scaler = GradScaler("cpu", enabled=False)
    assert _scale(model) is None
    assert not scaler.is_enabled()


def test_several_scalers_are_an_error_with_a_remedy() -> None:
    _, model = converted()
    scalers = [GradScaler("cpu"), GradScaler("cpu")]
    with pytest.raises(RuntimeError, match=r"2 gradient scalers.*distnorm.attach\(model"):
        backward(model)
    del scalers[0]
    assert _scale(model) == 65536.0
