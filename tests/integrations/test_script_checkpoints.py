"""Moving statistics beside what a script saves by itself: which model is recognized in it, and which takes it back."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import distnorm
from distnorm.attach import conversions_of
from distnorm.integrations import state_file
from distnorm.integrations.job import Job, WatchedSettings
from distnorm.integrations.saved_values import tensors_in
from distnorm.integrations.wrapping import install
from tests.integrations.hooked import MABN, backward, net, steps_of

pytestmark = pytest.mark.usefixtures("clean_hooks")

SAVING = replace(MABN, save_state=True)
SUFFIX = ".distnorm_state.pt"


@pytest.fixture
def job() -> Job:
    return install(SAVING)


def convert(job: Job, model: nn.Module, settings: Any = SAVING) -> nn.Module:
    assert replace_settings(job, settings).convert(model)
    return model


def replace_settings(job: Job, settings: Any) -> WatchedSettings:
    job.settings = settings
    return WatchedSettings.of_job(job, follow=True)


@pytest.fixture(autouse=True)
def _no_models_of_other_tests() -> None:
    """They have equal values."""
    gc.collect()


_optimizers: weakref.WeakKeyDictionary[nn.Module, SGD] = weakref.WeakKeyDictionary()


def step(model: nn.Module, times: int = 1) -> nn.Module:
    optimizer = _optimizers.setdefault(model, SGD(model.parameters(), lr=0.1))
    for _ in range(times):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return model


def trained(job: Job, times: int = 5) -> nn.Module:
    return step(convert(job, net()), times)


def resumed(job: Job, checkpoint: Any, model: nn.Module | None = None) -> nn.Module:
    """Loaded before conversion, as scripts do before they wrap the model."""
    model = net() if model is None else model
    model.load_state_dict(checkpoint)
    return convert(job, model)


def reducers(model: nn.Module) -> Any:
    return [each["reducer"] for each in distnorm.state_dict(model)]


def same_windows(one: nn.Module, other: nn.Module) -> bool:
    torch.testing.assert_close(reducers(one), reducers(other), rtol=0, atol=0)
    return steps_of(one) == steps_of(other) > 0


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# --- what is recognized --------------------------------------------------------------------------


def renamed(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": each for name, each in values.items()}


Form = tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]
FORMS: dict[str, Form] = {
    "state_dict": (lambda model: model.state_dict(), lambda saved: saved),
    "nested": (
        lambda model: {"epoch": 3, "nets": [{"a": {"b": model.state_dict()}}]},
        lambda saved: saved["nets"][0]["a"]["b"],
    ),
    "of DDP": (
        lambda model: {"model": renamed(model.state_dict(), "module.")},
        lambda saved: {name.removeprefix("module."): each for name, each in saved["model"].items()},
    ),
    "compiled": (
        lambda model: renamed(model.state_dict(), "_orig_mod.module."),
        lambda saved: {name.removeprefix("_orig_mod.module."): each for name, each in saved.items()},
    ),
    "in a container": (
        lambda model: nn.ModuleDict({"net": model, "head": nn.Linear(2, 2)}).state_dict(),
        lambda saved: {name[4:]: each for name, each in saved.items() if name.startswith("net.")},
    ),
    "copies": (
        lambda model: {name: each.detach().clone().cpu() for name, each in model.state_dict().items()},
        lambda saved: {name: each.clone() for name, each in saved.items()},
    ),
    "half": (
        lambda model: {name: each.half() for name, each in model.state_dict().items()},
        lambda saved: {name: each.float() for name, each in saved.items()},
    ),
    "double": (
        lambda model: {name: each.double() for name, each in model.state_dict().items()},
        lambda saved: saved,
    ),
    "without counters": (
        lambda model: {name: each for name, each in model.state_dict().items() if "num_batches" not in name},
        lambda saved: saved | {"1.num_batches_tracked": torch.tensor(5)},
    ),
    "after the average": (
        lambda model: {"ema": average_of(model).state_dict(), "model": model.state_dict()},
        lambda saved: saved["model"],
    ),
    "with an optimizer": (
        lambda model: {"optimizer": SGD(model.parameters(), 0.1, 0.9).state_dict(), "model": model.state_dict()},
        lambda saved: saved["model"],
    ),
}


def average_of(model: nn.Module) -> nn.Module:
    average = copy.deepcopy(model)
    with torch.no_grad():
        for each in (*average.parameters(), *average.buffers()):
            each.copy_(each * 0.5)
    return average


@pytest.mark.parametrize(("pack", "unpack"), FORMS.values(), ids=FORMS)
def test_a_model_in_what_a_script_saves(pack: Any, unpack: Any, job: Job, tmp_path: Path, caplog: Any) -> None:
    model = trained(job)
    torch.save(pack(model), tmp_path / "a.pth")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.pth", f"a.pth{SUFFIX}"]
    again = resumed(job, unpack(torch.load(tmp_path / "a.pth")))
    assert same_windows(again, model)
    torch.manual_seed(1)
    step(again)
    job._report()
    assert told(caplog) == []


def test_a_run_that_loads_goes_on_bit_for_bit(job: Job, tmp_path: Path) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    again = resumed(job, torch.load(tmp_path / "a.pth"))
    found = []
    for each in (model, again):
        torch.manual_seed(1)
        found.append([each.detach().clone() for each in step(each, 4).state_dict().values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("when", ["before conversion", "after conversion", "in parts", "by hand"])
def test_how_a_script_loads(when: str, job: Job, tmp_path: Path) -> None:
    model = trained(job)
    torch.save(model.state_dict(), str(tmp_path / "a.pth"))
    values = torch.load(str(tmp_path / "a.pth"))
    again = net()
    if when != "before conversion":
        convert(job, again)
    if when == "in parts":
        for name, layer in again.named_children():
            layer.load_state_dict({key[2:]: each for key, each in values.items() if key.startswith(name)})
    elif when == "by hand":
        for name, each in (*again.named_parameters(), *again.named_buffers()):
            each.data.copy_(values[name])
    else:
        again.load_state_dict(values)
    if when == "before conversion":
        convert(job, again)
    assert same_windows(again, model)


def test_keys_of_another_name(job: Job, tmp_path: Path) -> None:
    """Values tell, not names."""
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    odd = {f"layer{name}": each for name, each in torch.load(tmp_path / "a.pth").items()}
    assert same_windows(resumed(job, {name.removeprefix("layer"): each for name, each in odd.items()}), model)


def test_two_models_in_one_file(job: Job, tmp_path: Path) -> None:
    one, other = trained(job, 4), step(convert(job, net()), 6)
    torch.save({"one": one.state_dict(), "other": other.state_dict()}, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth")
    again = {name: resumed(job, loaded[name]) for name in ("other", "one")}
    assert same_windows(again["one"], one) and same_windows(again["other"], other)


def test_the_average_takes_no_state(job: Job, tmp_path: Path, caplog: Any) -> None:
    model = trained(job)
    torch.save({"model": model.state_dict(), "ema": average_of(model).state_dict()}, tmp_path / "a.pth")
    del model
    again = resumed(job, torch.load(tmp_path / "a.pth")["ema"])
    assert steps_of(step(again)) == 1
    job._report()
    assert len(told(caplog)) == 1 and "no model had its values when its training began" in told(caplog)[0]


def test_values_of_an_earlier_step_are_not_the_models(job: Job, tmp_path: Path) -> None:
    """The best epoch, kept in memory and written at the end: the windows are not of that epoch."""
    model = trained(job)
    best = copy.deepcopy(model.state_dict())
    step(model)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    torch.save(best, tmp_path / "a.pth")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]  # nor is what was there before


@pytest.mark.parametrize("whole", [True, False])
def test_a_pickled_model(whole: bool, job: Job, tmp_path: Path) -> None:
    model = trained(job)
    torch.save(model if whole else {"net": [model]}, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=False)
    assert same_windows(loaded if whole else loaded["net"][0], model)


@pytest.mark.parametrize("named", [True, False])
def test_file_objects(named: bool, job: Job, tmp_path: Path, caplog: Any) -> None:
    model = trained(job)
    with open(tmp_path / "a.pth", "wb") if named else io.BytesIO() as file:
        torch.save(model.state_dict(), file)
        torch.save({"loss": torch.ones(3)}, io.BytesIO())
    if not named:
        torch.save(model.state_dict(), io.BytesIO())
        assert len(told(caplog)) == 1 and "not saved to a file with a name" in told(caplog)[0]
        assert not list(tmp_path.iterdir())
        return
    with open(tmp_path / "a.pth", "rb") as file:
        assert same_windows(resumed(job, torch.load(file)), model)
    assert told(caplog) == []


def test_another_thread(job: Job, tmp_path: Path, caplog: Any) -> None:
    """It must not wait for the collectives of the one that trains, and that one has trained on meanwhile."""
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    values = model.state_dict()
    thread = threading.Thread(target=torch.save, args=(values, tmp_path / "a.pth"))
    thread.start()
    thread.join()
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]
    assert len(told(caplog)) == 1 and "in another thread" in told(caplog)[0]


@pytest.mark.parametrize("recipe", ["sync_bn", "local_bn"])
def test_recipes_without_moving_statistics_write_nothing(recipe: str, tmp_path: Path, caplog: Any) -> None:
    settings = replace(SAVING, recipe=recipe, options={})
    job = install(settings)
    model = step(convert(job, net(), settings), 2)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    step(resumed(job, torch.load(tmp_path / "a.pth")))
    job._report()
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"] and told(caplog) == []


def test_without_the_setting_nothing_is_patched(tmp_path: Path) -> None:
    save, load = torch.save, torch.load
    job = install(MABN)
    torch.save(step(convert(job, net(), MABN)).state_dict(), tmp_path / "a.pth")
    assert torch.save is save and torch.load is load
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]


def test_signatures_stay(job: Job) -> None:
    assert [*inspect.signature(torch.save).parameters][:2] == ["obj", "f"]
    assert "weights_only" in inspect.signature(torch.load).parameters
    assert torch.save is torch.serialization.save and torch.save.__name__ == "save"
    file = io.BytesIO()
    torch.save(obj=3, f=file)
    file.seek(0)
    assert torch.load(f=file, weights_only=True) == 3


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["an optimizer", "stock values", "a tensor"])
def test_what_holds_no_state_removes_the_one_before(what: str, job: Job, tmp_path: Path) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert (tmp_path / f"a.pth{SUFFIX}").is_file()
    others = {"an optimizer": SGD(model.parameters(), 0.1).state_dict(), "stock values": net().state_dict()}
    torch.save(others.get(what, torch.ones(3)), tmp_path / "a.pth")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("move", [os.replace, shutil.copy, os.link])
def test_a_checkpoint_of_another_name(move: Any, job: Job, tmp_path: Path) -> None:
    """Written under a temporary name, or copied as the best: the state is found in the folder."""
    older = trained(job, 4)
    torch.save(older.state_dict(), tmp_path / "older.pth")
    model = step(older, 2)
    torch.save(model.state_dict(), tmp_path / "tmp.pth")
    move(tmp_path / "tmp.pth", tmp_path / "last.pth")
    assert same_windows(resumed(job, torch.load(tmp_path / "last.pth")), model)


def test_a_file_of_another_save(job: Job, tmp_path: Path, caplog: Any) -> None:
    """As when the process was killed between the two files, or only the checkpoint was put back."""
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    shutil.copy(tmp_path / f"a.pth{SUFFIX}", tmp_path / "kept")
    torch.save(step(model).state_dict(), tmp_path / "a.pth")
    (tmp_path / "kept").replace(tmp_path / f"a.pth{SUFFIX}")
    again = resumed(job, torch.load(tmp_path / "a.pth"))
    assert steps_of(again) == 0
    assert len(told(caplog)) == 1 and "is not what" in told(caplog)[0]


@pytest.mark.parametrize("content", [b"", b"no file of torch", None])
def test_a_damaged_file_starts_cold(content: bytes | None, job: Job, tmp_path: Path, caplog: Any) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    file = tmp_path / f"a.pth{SUFFIX}"
    if content is None:
        torch.save({"version": 99, "entries": []}, file)
    else:
        file.write_bytes(content)
    again = resumed(job, torch.load(tmp_path / "a.pth"))
    assert steps_of(step(again)) == 1
    assert any(str(file) in each and "cannot be used" in each for each in told(caplog))


def test_a_write_that_fails(job: Job, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for _ in range(2):
            torch.save(step(model).state_dict(), tmp_path / "a.pth")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]
    assert len(told(caplog)) == 1 and "No space left on device" in told(caplog)[0]


def test_a_failing_save_of_the_script_is_its_own(job: Job, tmp_path: Path) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(RuntimeError):
        torch.save(model.state_dict(), tmp_path / "none" / "a.pth")
    assert (tmp_path / f"a.pth{SUFFIX}").is_file()


# --- who takes it --------------------------------------------------------------------------------


def test_a_state_of_another_recipe(tmp_path: Path, caplog: Any) -> None:
    job = install(SAVING)
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    lazy = replace(SAVING, recipe="lazy_bn", options={})
    again = net()
    again.load_state_dict(torch.load(tmp_path / "a.pth"))
    assert steps_of(step(convert(job, again, lazy))) == 1
    assert len(told(caplog)) == 1 and "the state given is of recipe" in told(caplog)[0]


def test_another_window_takes_it(job: Job, tmp_path: Path, caplog: Any) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    wider = replace(SAVING, options={**MABN.options, "window": 7})
    again = net()
    again.load_state_dict(torch.load(tmp_path / "a.pth"))
    assert steps_of(convert(job, again, wider)) == 5 and told(caplog) == []


def test_a_load_in_the_middle_of_training(job: Job, tmp_path: Path, caplog: Any) -> None:
    """The best epoch is restored: other ranks may not restore it, so windows stay."""
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    step(model, 3)
    before = reducers(model)
    model.load_state_dict(torch.load(tmp_path / "a.pth"))
    torch.testing.assert_close(reducers(model), before, rtol=0, atol=0)
    step(model)
    assert steps_of(model) == 9
    assert len(told(caplog)) == 1 and "was loaded into a model that is training already" in told(caplog)[0]


def test_a_load_for_a_last_evaluation_is_no_news(job: Job, tmp_path: Path, caplog: Any) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    step(model, 2)
    model.load_state_dict(torch.load(tmp_path / "a.pth"))
    model.eval()(torch.randn(5, 3))
    job._report()
    assert told(caplog) == []


def test_what_no_model_took_is_told_at_the_end(job: Job, tmp_path: Path, caplog: Any) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    del model
    gc.collect()
    torch.load(tmp_path / "a.pth")
    step(net())
    assert told(caplog) == []
    job._report()
    assert len(told(caplog)) == 1 and "moving statistics have started cold: " in told(caplog)[0]


def test_what_the_script_loads_itself_comes_first(job: Job, tmp_path: Path, caplog: Any) -> None:
    """In either order, before binding and after."""
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    own = distnorm.state_dict(model)
    own[0]["reducer"]["then"]["window"]["ring"] *= 2
    for bound in (False, True):
        for first in (False, True):
            again = convert(job, net())
            if first and not bound:
                distnorm.load_state_dict(again, own)
            again.load_state_dict(torch.load(tmp_path / "a.pth"))
            if bound:
                distnorm.attach(again)
            if bound or not first:
                distnorm.load_state_dict(again, own)
            torch.testing.assert_close(reducers(again)[0]["then"], own[0]["reducer"]["then"], rtol=0, atol=0)
            assert steps_of(step(again)) == 6
    job._report()
    assert told(caplog) == []


def test_a_checkpoint_with_a_section_of_its_own(job: Job, tmp_path: Path, caplog: Any) -> None:
    """As Lightning's callback writes it, into a buffer."""
    model = trained(job)
    torch.save({"state_dict": model.state_dict(), "distnorm": {"state": distnorm.state_dict(model)}}, io.BytesIO())
    assert told(caplog) == []


def test_a_script_that_converts_by_itself(job: Job, tmp_path: Path) -> None:
    model, again = (distnorm.convert(net(), "mabn", **MABN.options) for _ in range(2))
    step(model, 3)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    again.load_state_dict(torch.load(tmp_path / "a.pth"))
    assert same_windows(again, model)


class Branch(nn.Module):
    """The first layer feeds a norm and something else, which ``convert`` cannot know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        return self.head(self.norm(y) + y)


def test_which_weights_are_centred_is_known_in_the_first_forward_pass(tmp_path: Path) -> None:
    settings = replace(SAVING, options={"warmup": 2, "window": 3})
    job = install(settings)
    model = step(convert(job, Branch(), settings), 3)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    again = Branch()
    again.load_state_dict(torch.load(tmp_path / "a.pth"))
    convert(job, again, settings)
    x = torch.randn(5, 3)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert conversions_of(again)[0].feeders.left == {"first"}


def test_no_tensor_is_kept_alive(job: Job, tmp_path: Path) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth")
    references = [weakref.ref(each.untyped_storage()) for each in loaded.values()]
    del loaded
    gc.collect()
    assert not any(reference() for reference in references)


def test_a_state_is_forgotten_once_it_is_taken(job: Job, tmp_path: Path) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    step(resumed(job, torch.load(tmp_path / "a.pth")))
    assert job.checkpoints is not None and job.checkpoints._found == {}


def test_ranks_that_save_to_one_path(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers see a whole file of either."""
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    entries = state_file.fitting(tmp_path / f"a.pth{SUFFIX}", tensors_in(model.state_dict()))
    monkeypatch.setattr(os, "getpid", threading.get_ident)

    def write() -> None:
        for _ in range(10):
            state_file.write(tmp_path / "a.pth", entries)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for each in writers:
        each.start()
    while any(each.is_alive() for each in writers):
        assert len(state_file.fitting(tmp_path / f"a.pth{SUFFIX}", tensors_in(model.state_dict()))) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.pth", f"a.pth{SUFFIX}"]


@pytest.mark.parametrize("outcome", ["other values", "an error"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    outcome: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(job)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    file, tensors = tmp_path / f"a.pth{SUFFIX}", tensors_in(model.state_dict())
    entries, read, reads = state_file.fitting(file, tensors), state_file._among, []

    def replaced(*given: Any) -> list[Any]:
        reads.append(given)
        if len(reads) > 1:
            return read(*given)
        state_file.write(tmp_path / "a.pth", entries)
        if outcome == "an error":
            raise RuntimeError("the end of the file is missing")
        return []

    monkeypatch.setattr(state_file, "_among", replaced)
    assert len(state_file.fitting(file, tensors)) == 1 and len(reads) == 2


def test_a_file_that_stays_as_it_is_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"nothing of ours")
    with pytest.raises(RuntimeError):
        state_file.fitting(tmp_path / "broken", {})
