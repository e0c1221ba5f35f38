"""The ``distnorm`` command: what it prints, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from distnorm import recipes
from distnorm.cli import main as cli

WEIGHTS = "weights: 'none' | 'centralized' | 'standardized' | 'normalized'"


def test_recipes_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err
    assert lines[::2] == [
        f"local_bn({WEIGHTS} = 'none')",
        f"sync_bn({WEIGHTS} = 'none', overlap: bool = False)",
        f"group_bn(size: int | None = None, axis: str | None = None, {WEIGHTS} = 'none')",
        f"hierarchical_bn(local: str = 'local', node: str = 'node', {WEIGHTS} = 'none')",
        f"periodic_bn(every: int = 8, {WEIGHTS} = 'none')",
        "mabn(window: int = 16, warmup: int = 100, clip: float | None = 5.0, loss_reduction: 'mean' | 'sum' = 'mean', "
        f"{WEIGHTS} = 'centralized')",
        "hierarchical_mabn(local: str = 'local', node: str = 'node', window: int = 16, warmup: int = 100, "
        f"clip: float | None = 5.0, {WEIGHTS} = 'centralized')",
        f"lazy_bn(window: int = 8, warmup: int = 16, {WEIGHTS} = 'centralized')",
    ]
    assert lines[1::2] == [f"    {each.summary}" for each in recipes.available()]


@pytest.mark.parametrize("name", [each.name for each in recipes.available()])
def test_recipes_describes_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", name]) == 0
    assert capsys.readouterr() == (recipes.describe(name).text + "\n", "")


def test_the_description_has_the_paper_and_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["recipes", "group_bn"])
    out = capsys.readouterr().out
    assert "Ying et al." in out
    assert "    size: neighbouring ranks per group" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "group_pn"], "distnorm: error: unknown recipe 'group_pn' (did you mean 'group_bn'?)"),
        (["recipes", "group_bn", "sync_bn"], "unrecognized arguments: sync_bn"),
        (["train"], "invalid choice: 'train'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_a_wrong_call_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in err and err.startswith("usage: distnorm") and not out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "recipes" in capsys.readouterr().out


def test_as_a_process() -> None:
    program = "import sys; from distnorm.cli.main import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", program, "recipes", "x"], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("distnorm: error: unknown recipe 'x'; allowed are local_bn")


def test_the_installed_script_is_this_function() -> None:
    try:
        scripts = metadata.distribution("distnorm").entry_points.select(group="console_scripts", name="distnorm")
    except metadata.PackageNotFoundError:
        pytest.skip("distnorm is on the path but not installed")
    assert [script.load() for script in scripts] == [cli.main]
