"""Where the settings of DeepSpeed's engine come from; the engine itself is in test_deepspeed.py."""

from __future__ import annotations

import base64
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

import distnorm
from distnorm import DistNorm
from distnorm.integrations.deepspeed import enable, wrap_initialize
from distnorm.settings import Settings


class StandIn(ModuleType):
    """As much of DeepSpeed as reading a configuration takes: an engine that is never built."""

    class PipelineModule(nn.Module):
        pass

    def __init__(self) -> None:
        super().__init__("deepspeed")
        self.seen: list[nn.Module] = []

    def initialize(
        self, args: Any = None, model: Any = None, config: Any = None, config_params: Any = None
    ) -> tuple[Any, ...]:
        self.seen.append(model)
        raise NotBuilt


class NotBuilt(Exception):
    pass


def converted_by(stand_in: StandIn, **given: Any) -> str | None:
    """The recipe that ``initialize`` converts a model to."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(NotBuilt):
        stand_in.initialize(model=net, **given)
    assert stand_in.seen[-1] is net
    return net[0].recipe.name if isinstance(net[0], DistNorm) else None


SECTION = {"zero_optimization": {"stage": 1}, "distnorm": {"recipe": "group_bn", "options": {"size": 2}}}


def test_the_section_is_read_wherever_deepspeed_finds_its_configuration(tmp_path: Path) -> None:
    stand_in = StandIn()
    wrap_initialize(stand_in, None)
    path = tmp_path / "zero.json"
    path.write_text("# with a comment, as DeepSpeed allows\n" + json.dumps(SECTION))
    encoded = base64.urlsafe_b64encode(json.dumps(SECTION).encode()).decode()
    arguments = SimpleNamespace(deepspeed_config=str(path))
    for given in ({"config": SECTION}, {"config": str(path)}, {"config": path}, {"config_params": SECTION},
                  {"args": arguments}, {"config": encoded}):  # fmt: skip
        assert converted_by(stand_in, **given) == "group_bn(size=2)"
    assert converted_by(stand_in, config={}) is None
    assert converted_by(stand_in) is None


def test_what_is_given_comes_before_the_section_and_a_default_after() -> None:
    stand_in = StandIn()
    wrap_initialize(stand_in, None, default=Settings(recipe="local_bn"))
    assert converted_by(stand_in, config=SECTION) == "group_bn(size=2)"
    assert converted_by(stand_in, config={}) == "local_bn"
    wrap_initialize(stand_in, Settings(recipe="sync_bn"))
    wrap_initialize(stand_in, None)
    assert converted_by(stand_in, config=SECTION) == "sync_bn"


def test_wrapping_keeps_the_signature() -> None:
    stand_in = StandIn()
    expected = inspect.signature(stand_in.initialize)
    wrap_initialize(stand_in, None)
    assert inspect.signature(stand_in.initialize) == expected
    with pytest.raises(TypeError, match="config_file"):
        stand_in.initialize(config_file="zero.json")


def test_a_pipeline_that_code_converts_is_refused() -> None:
    stand_in = StandIn()
    wrap_initialize(stand_in, Settings(required=True))
    with pytest.raises(ValueError, match="pipeline engine is not supported"):
        stand_in.initialize(model=pipeline(), config={})
    stand_in = StandIn()
    wrap_initialize(stand_in, None)
    with pytest.raises(ValueError, match="pipeline engine is not supported"):
        stand_in.initialize(model=distnorm.convert(pipeline(), "sync_bn"), config={})


@pytest.mark.parametrize(("default", "config"), [(None, SECTION), (Settings(), {})])
def test_a_pipeline_that_no_code_converts_trains_as_it_is(default: Settings | None, config: dict[str, Any]) -> None:
    stand_in = StandIn()
    wrap_initialize(stand_in, None, default=default)
    net = pipeline()
    with pytest.warns(UserWarning, match="trains as it is: .* pipeline engine"), pytest.raises(NotBuilt):
        stand_in.initialize(model=net, config=config)
    assert type(net.norm) is nn.BatchNorm1d


def pipeline() -> nn.Module:
    net = StandIn.PipelineModule()
    net.norm = nn.BatchNorm1d(2)
    return net


def test_enable_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"enable\(size\): need a recipe"):
        enable(size=2)
    with pytest.raises(ValueError, match="unknown recipe 'sinc_bn'"):
        enable("sinc_bn")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'distnorm\[deepspeed\]'"):
        enable("sync_bn")
