"""distnorm plan: units, recommendations, and the command itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from distnorm.cli import main as cli
from distnorm.diagnostics import draw
from distnorm.diagnostics.plan import Prediction, recommend
from distnorm.diagnostics.plan_units import bytes_per_second, seconds, show_seconds

STEP = 0.1


def made(
    recipe: str, exposed: float, *, exact: bool = False, covers_all: bool = True, blocking: float = 4
) -> Prediction:
    return Prediction(
        recipe=recipe,
        world=8,
        blocking=blocking,
        background=0 if blocking else 1,
        nbytes=10,
        blocking_seconds=exposed if blocking else 0,
        background_seconds=0 if blocking else STEP / 2 + exposed,
        exposed_seconds=exposed,
        exact=exact,
        covers_all=covers_all,
    )


@pytest.mark.parametrize(
    ("predictions", "recipe", "reason"),
    [
        (
            [made("a", 0.004, exact=True), made("m", 0, blocking=0)],
            "a",
            "It is exact, and its 4 collectives add 4 ms, 4.0%",
        ),
        ([made("a", 0.006, exact=True), made("b", 0.004, exact=True)], "b", "It is exact"),
        (
            [made("a", 0.03, exact=True), made("m", 0, blocking=0)],
            "m",
            "The cheapest exact recipe, a, would add 30% to the step; here a collective of 50 ms runs beside",
        ),
        (
            [made("a", 0.03, exact=True), made("m", 0.04, blocking=0)],
            "a",
            "It is exact, and the cheapest of all, though its 4 collectives add 30 ms",
        ),
        (
            [made("a", 0.09, exact=True), made("m", 0.04, blocking=0)],
            "m",
            "outlasts the step and adds 40 ms, 40.0% of it",
        ),
    ],
)
def test_the_recommendation(predictions: list[Prediction], recipe: str, reason: str) -> None:
    found = recommend([made("l", 0, covers_all=False), *predictions], STEP)
    assert found is not None and found.recipe == recipe
    assert reason in found.reason and found.reason.endswith(".")


def test_nothing_is_recommended_where_nothing_shares_with_all() -> None:
    assert recommend([made("l", 0, covers_all=False)], STEP) is None


# --- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("30us", 3e-5), ("1.5 ms", 1.5e-3), ("2s", 2.0), ("250ns", 2.5e-7), ("0us", 0.0)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("10GB/s", 1e10), ("25 Gbit/s", 3.125e9), ("100MB/s", 1e8)])
def test_bandwidths(text: str, value: float) -> None:
    assert bytes_per_second(text) == pytest.approx(value)


def test_times_are_shown_in_a_unit_that_suits_them() -> None:
    assert [show_seconds(value) for value in (0, 3e-7, 3e-5, 0.0015, 0.2, 2.5)] == [
        "0 ms", "300 ns", "30 us", "1.5 ms", "200 ms", "2.5 s",
    ]  # fmt: skip


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "planned.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def small():\n    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))\n"
        "def plain():\n    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))\n"
        "def reads():\n    model = small()\n    model.level = float(torch.ones(()))\n    return model\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planned", raising=False)
    return tmp_path


def test_the_table_the_file_and_the_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "planned:small", "--world", "2,16", "--recipes", "sync_bn", "mabn", "--backend", "gloo"]
    given = ["--alpha", "1ms", "--alpha-node", "5ms", "--beta", "1GB/s", "--message", "0us", "--step", "20ms"]
    assert cli.main([*asked, *given, "--json", "plan.json", "--picture", "plan.png"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err
    assert lines[0] == (
        "planned:small: 2 norm layers, 8 channels; gloo, up to 8 ranks per node, step without communication of "
        "statistics 20 ms"
    )
    assert "a round and bandwidth in a node: 1 ms and 1 GB/s; between nodes: 5 ms and 1 GB/s" in lines[1]
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines[5:9]}
    assert rows["2", "sync_bn"] == ["4", "0", "272", "B", "4", "ms", "20.0%"]
    assert rows["16", "sync_bn"] == ["4", "0", "272", "B", "20", "ms", "100.1%"]
    assert rows["2", "mabn"][:2] == ["0", "1"] and rows["2", "mabn"][-3:] == ["0", "ms", "0.0%"]
    assert lines[-2].startswith("2 ranks: mabn. The cheapest exact recipe, sync_bn, would add 20% to the step;")
    # 30 rounds of 5 ms outlast the step by 130 ms.
    assert lines[-1] == (
        "16 ranks: sync_bn. It is exact, and the cheapest of all, though its 4 collectives add 20 ms, 100.1% of the "
        "step."
    )

    record = json.loads(Path("plan.json").read_text())
    assert (record["format"], record["model"], record["layers"], record["channels"]) == (1, "planned:small", 2, 8)
    assert record["network"]["alpha_node"] == 5e-3 and record["step_seconds"] == 0.02
    first = record["predictions"][0]
    assert (first["recipe"], first["world"], first["blocking"], first["nbytes"]) == ("sync_bn", 2, 4, 272)
    assert first["exposed_seconds"] == pytest.approx(4e-3 + 272e-9)
    assert [each["recipe"] for each in record["recommendations"]] == ["mabn", "sync_bn"]
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_costs_the_picture_only(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "--model", "planned:small", "--world", "2", "--picture", "plan.png"]) == 0
    out, err = capsys.readouterr()
    assert "2 ranks: sync_bn." in out
    assert err == "no picture plan.png: matplotlib is missing; pip install 'distnorm[demo]'\n"
    assert not Path("plan.png").exists()


def test_a_model_that_meta_tensors_cannot_build_is_built_for_real(here: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be built on torch's meta device"):
        assert cli.main(["plan", "--model", "planned:reads", "--world", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model planned", "--model 'planned': need module:function, such as torchvision.models:resnet50."),
        ("--model plant:small", "--model 'plant:small': there is no module 'plant' in "),
        ("--model planned:smalll", "module 'planned' has no function 'smalll' (did you mean 'small'?)."),
        ("--model planned:number", "--model 'planned:number': it returned int; need a torch.nn.Module."),
        ("--model planned:plain", "nothing to synchronize; its norm layers: LayerNorm."),
        (
            "--world 12",
            "world size 12 is not divisible by the 8 ranks of a node; allowed are 1 to 8, and multiples of 8",
        ),
        ("--world 2,x", "--world 'x': need whole numbers separated by commas, such as 2,8,64."),
        ("--world 0", "world size 0 with 8 ranks per node: both must be at least 1."),
        ("--recipes sink_bn", "unknown recipe 'sink_bn' (did you mean 'sync_bn'?)"),
        ("--recipes group_bn(size=3)", "group size 3 does not divide the 2 data-parallel ranks; allowed are [1, 2]."),
        ("--alpha 30", "--alpha '30': need a duration such as 30us; units are ns, us, ms, s."),
        ("--beta-node 0GB/s", "--beta-node '0GB/s': need a bandwidth such as 10GB/s; units are MB/s, GB/s"),
        ("--step 0ms", "a step of 0 ms: need a duration above 0."),
        ("--measured planned.py", "--measured planned.py: not JSON ("),
        ("--measured other.json", "not a file of `distnorm bench --json FILE` in format 1."),
        ("--measured absent.json", "No such file or directory: 'absent.json'"),
        ("--picture plan.xyz", "Format 'xyz' is not supported"),
    ],
)
def test_errors_name_what_was_given_and_what_is_allowed(
    here: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.json").write_text("{}")
    # The later of two equal options counts.
    assert cli.main(["plan", "--model", "planned:small", "--world", "2", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("distnorm plan: error: ") and message in err
