"""Models that cannot be converted, or of which only some are to be: they train as they are, and one line says why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

import distnorm
from distnorm import DistNorm
from distnorm.integrations.deepspeed import wrap_initialize
from distnorm.integrations.job import Job, WatchedSettings
from distnorm.integrations.wrapping import install
from distnorm.settings import Settings
from tests.integrations.test_deepspeed_section import NotBuilt, StandIn

pytestmark = pytest.mark.usefixtures("clean_hooks")


class Ghost(nn.BatchNorm1d):
    """Replaces torch's forward, so it cannot be converted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1)


class Generator(nn.Sequential):
    pass


class Discriminator(nn.Sequential):
    pass


def generator(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> Generator:
    torch.manual_seed(0)
    return Generator(nn.Linear(3, 6), norm(6), nn.Linear(6, 6), norm(6))


def discriminator() -> Discriminator:
    return Discriminator(nn.Linear(3, 6), nn.BatchNorm1d(6))


def converted_names(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_modules() if isinstance(each, DistNorm)]


def mixed() -> Generator:
    """A layer of distnorm.nn has made the norm inside with another recipe, and been trained."""
    inner = distnorm.nn.ConditionalBatchNorm(6, 2, recipe="local_bn")
    inner(torch.randn(4, 6, 2, 2), torch.zeros(4, dtype=torch.long))
    return Generator(nn.Linear(3, 6), inner, nn.Linear(6, 6), nn.BatchNorm1d(6))


def gated() -> Generator:
    model = generator()
    model[3].gate_weight = None
    return model


CANNOT = {
    "every norm is left alone": (lambda: generator(Ghost), Settings(), "its batch norms are subclasses"),
    "where names another layer": (
        generator, Settings(where=("backbone.*",)), r"where=['backbone.*'] selects none of ['1', '3']"),
    "groups do not divide": (generator, Settings(recipe="group_norm", options={"groups": 4}), "1: "),
    "another recipe": (mixed, Settings(recipe="mabn"), "1.norm: already converted to "),
    "its own attribute": (gated, Settings(recipe="iebn"), "has an attribute 'gate_weight' already"),
}  # fmt: skip


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning that the job has one process."""
    monkeypatch.setattr(Job, "_warn_if_alone", lambda _: None)


@pytest.mark.parametrize("case", CANNOT)
def test_a_model_that_cannot_be_converted_trains_as_it_is(
    case: str, world: None, several: None, capsys: pytest.CaptureFixture[str]
) -> None:
    make, settings, reason = CANNOT[case]
    model = make()
    classes, job = [type(each) for each in model.modules()], install(settings)
    with pytest.warns(UserWarning) as caught:
        wrapped = DistributedDataParallel(copy.deepcopy(model))
    texts = [str(each.message) for each in caught if "unknown subclasses" not in str(each.message)]
    assert len(texts) == 1, texts
    assert texts[0].startswith("distnorm: Generator is not converted and trains as it is: ") and reason in texts[0]
    assert [type(each) for each in wrapped.module.modules()] == classes
    if case != "another recipe":
        expected = step(copy.deepcopy(model))
        torch.testing.assert_close(step(wrapped), expected, rtol=0, atol=0)
    job._report()
    unused = (
        "distnorm.run: warning: the patterns ['backbone.*'] selected no norm layer of any model that the script wrapped"
    )
    assert capsys.readouterr().err == (f"{unused}: Generator.\n" if case == "where names another layer" else "")


def step(model: nn.Module) -> torch.Tensor:
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(15.0).reshape(5, 3).sin()).square().mean().backward()
        optimizer.step()
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def test_frozen_norms_and_none_at_all_are_no_reason_to_stop(world: None, several: None) -> None:
    install(Settings(recipe="local_bn"))
    frozen = generator().requires_grad_(False).eval()
    frozen.append(nn.Linear(6, 1))
    assert converted_names(DistributedDataParallel(frozen)) == ["module.1", "module.3"]
    assert converted_names(DistributedDataParallel(frozen)) == ["module.1", "module.3"]  # wrapped again
    with pytest.warns(UserWarning, match="has no batch norm layer to convert"):
        DistributedDataParallel(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ({"Generator": ["1"], "Discriminator": "*"}, (["1"], ["1"])),
        ("Generator: 3; Discriminator: *", (["3"], ["1"])),
        ("Gen*: 1, 3", (["1", "3"], [])),
        (f"{__name__}.Discriminator: 1", ([], ["1"])),
        ('{"Generator": "3"}', (["3"], [])),
        ("1", (["1"], ["1"])),
    ],
)
def test_patterns_by_model(where: object, names: tuple[list[str], list[str]]) -> None:
    settings = Settings.of({"recipe": "local_bn", "where": where}, "cfg.yaml")
    assert Settings.of(settings.section(), "again") == settings
    models = generator(), discriminator()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model that is not named is left alone without a word
        assert [settings.convert(model) for model in models] == [bool(each) for each in names]
    assert tuple(converted_names(model) for model in models) == names
    compiled = torch.compile(generator())
    assert settings.convert(compiled) is bool(names[0])


def test_a_pattern_that_matches_in_one_model_of_two(
    world: None, several: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = install(Settings.of({"recipe": "local_bn", "where": "3, nekc.*"}, "flags"))
    assert converted_names(DistributedDataParallel(generator())) == ["module.3"]
    with pytest.warns(UserWarning, match=r"Discriminator is not .*: where=\['3', 'nekc.*'\] selects none of \['1'\]$"):
        DistributedDataParallel(discriminator())
    job._report()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "distnorm.run: warning: the patterns ['nekc.*'] selected no norm layer of any model that the script wrapped: "
        "Discriminator, Generator."
    )


def test_parts_of_a_whole_that_was_left_alone_are_left_alone(several: None) -> None:
    """FSDP's class comes to the parts after the whole."""
    job = install(Settings(recipe="local_bn", where=("0",)))
    part = discriminator()
    part[0] = nn.BatchNorm1d(3)
    whole = Generator(part)
    with pytest.warns(UserWarning) as caught:
        job.convert_before_sharding(whole)
        job.convert_before_sharding(part)
    assert len(caught) == 1 and converted_names(whole) == []


def test_a_model_that_is_named_and_never_wrapped(
    world: None, several: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = install(Settings.of({"recipe": "local_bn", "where": "Encoder: *; Discriminator: *"}, "flags"))
    assert converted_names(DistributedDataParallel(discriminator())) == ["module.1"]
    job._report()
    assert "the patterns ['Encoder: *'] selected no norm layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("Generator: a; b", ["where='Generator: a; b'", "need patterns of layer names", "Discriminator: *"]),
        ("a; b", ["need patterns of layer names"]),
        ("Generator:", ["need patterns of layer names"]),
        (": a", ["need patterns of layer names"]),
        ("G: a; G: b", ["'G' is given twice"]),
        ('{"G": "a", "G": "b"}', ["'G' is given twice"]),
        ('{"G": 3}', ["where must be a list of patterns", "a mapping of the classes of models", "got {'G': 3}"]),
        ({"G": []}, ["where must be a list of patterns", "got {'G': ()}"]),
        ({}, ["where must be a list of patterns", "got {}"]),
        ({3: ["a"]}, ["where must be a list of patterns"]),
    ],
)
def test_patterns_that_are_not_allowed(where: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Settings.of({"where": where}, "flags of distnorm.run")
    assert str(raised.value).startswith("flags of distnorm.run: ")
    for word in words:
        assert word in str(raised.value)


def test_what_code_asks_for_is_an_error_and_what_a_file_asks_for_is_not() -> None:
    model = generator(Ghost)
    with pytest.raises(ValueError, match="enable: its batch norms are subclasses that are left alone"):
        Settings(source="enable", required=True).convert(model)
    stand_in = StandIn()
    wrap_initialize(stand_in, None)
    with pytest.warns(UserWarning, match="Generator is not converted and trains as it is: where="), \
         pytest.raises(NotBuilt):  # fmt: skip
        stand_in.initialize(model=generator(), config={"distnorm": {"where": ["backbone.*"]}})


# --- averages of the weights, and teachers -----------------------------------------------------------------------


def twins_of(recipe: str, options: dict[str, object], *twins: nn.Module, model: nn.Module) -> Job:
    job = install(Settings(recipe=recipe, options=options))
    assert WatchedSettings.of_job(job, follow=True).convert(model)
    step(model)
    step(model)
    return job


def average() -> tuple[nn.Module, nn.Module]:
    model = generator()
    return model, AveragedModel(model)


def teacher() -> tuple[nn.Module, nn.Module]:
    model, other = generator(), generator()
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize("make", [average, teacher])
@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        ("sync_bn", {}, "it evaluates alike.\n"),
        (
            "gbn",
            {"deviation": "l1", "policy": "local"},
            "alike, but not with statistics that it computes itself (update_bn).\n",
        ),
        ("mabn", {}, "it evaluates alike, but not with statistics that it computes itself (update_bn).\n"),
    ],
)
def test_a_copy_from_before_that_evaluates_alike(
    make: Callable[[], tuple[nn.Module, nn.Module]], recipe: str, options: dict[str, object], says: str,
    capsys: pytest.CaptureFixture[str], several: None,
) -> None:  # fmt: skip
    model, other = make()
    twins_of(recipe, options, other, model=model)
    said = capsys.readouterr().err
    assert said.count("1 other Generator built alike keeps stock layers. ") == 1 and said.endswith(says)


@pytest.mark.parametrize(
    ("recipe", "options", "why"),
    [
        ("layer_norm", {}, "the wrapped one does not normalize by running statistics"),
        ("sync_bn", {"weights": "standardized"}, "the wrapped one computes with standardized weights"),
        ("sync_bn", {"weights": "normalized"}, "the wrapped one computes with normalized weights"),
        ("iebn", {"policy": "local"}, "layers of the wrapped one also have gate_bias, gate_weight"),
    ],
)
def test_a_copy_from_before_that_evaluates_otherwise(
    recipe: str, options: dict[str, object], why: str, several: None
) -> None:
    model, other = average()
    with pytest.warns(UserWarning, match=f"1 other Generator .* it evaluates otherwise, since {why}.") as caught:
        twins_of(recipe, options, other, model=model)
    assert len(caught) == 1


def test_what_is_no_copy(several: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Another width, a copy of the converted model, another wrapped model of this class, a class that lies."""

    class Lazy:
        @property
        def __class__(self) -> type:  # type: ignore[override]
            raise RuntimeError("looked at")

    model, wider = generator(), Generator(nn.Linear(4, 6), nn.BatchNorm1d(6))
    kept = SimpleNamespace(lazy=Lazy())
    job = install(Settings(recipe="local_bn"))
    settings = WatchedSettings.of_job(job, follow=True)
    left = generator(Ghost)
    with pytest.warns(UserWarning):
        settings.convert(left)
    settings.convert(model)
    after = copy.deepcopy(model)
    step(model)
    assert "built alike" not in capsys.readouterr().err
    del wider, after, kept, left  # they were alive
