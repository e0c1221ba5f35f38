"""``distnorm config``: what it writes, what it leaves alone, what it says."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distnorm.cli import main as cli

PLAIN = """\
# written by hand
compute_environment: LOCAL_MACHINE

distributed_type: MULTI_GPU  # GPUs
num_processes: 8
mixed_precision: 'no'
"""
SECTION = {"recipe": "group_bn", "options": {"size": 4}, "where": ["backbone.*", "neck.0"], "ledger": True}
FLAGS = ["--recipe", "group_bn", "--option", "size=4", "--where", "backbone.*", "neck.0", "--ledger"]


class Terminal(io.StringIO):
    """A terminal at which someone types these lines."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cfg.yaml"
    path.write_text(PLAIN)
    return path


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python without accelerate."""
    for name in [*sys.modules, "accelerate"]:
        if name.partition(".")[0] == "accelerate":
            monkeypatch.setitem(sys.modules, name, None)
    yield


def run(path: Path, *flags: str) -> int:
    return cli.main(["config", "--config_file", str(path), *flags])


def test_writes_the_section_behind_everything_else(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, *FLAGS) == 0
    text = config.read_text()
    assert text.startswith(PLAIN)
    assert yaml.safe_load(text[len(PLAIN) :]) == {"distnorm_config": SECTION}
    out, err = capsys.readouterr()
    assert text[len(PLAIN) :] in out and f"distnorm launch --config_file {config}" in out and not err


def test_patterns_by_model_are_written_as_a_mapping(config: Path) -> None:
    assert run(config, "--where", "Generator: a.*, b; Discriminator: *") == 0
    section = yaml.safe_load(config.read_text())["distnorm_config"]
    assert section["where"] == {"Generator": ["a.*", "b"], "Discriminator": ["*"]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("distnorm_config:\n  recipe: mabn\n  options:\n    window: 8\n", ""),
        ("distnorm_config:\n  recipe: mabn", ""),
        ("distnorm_config: {recipe: mabn}  # ours\n", "\n# about debug\ndebug: false\n"),
        ("distnorm_config:\n  # why\n  recipe: mabn\n\n", "debug: false\n"),
        ("distnorm_config:\n  recipe: mabn\n  where:\n  - a.*\n", "# the end\n"),
        ("", ""),
    ],
    ids=["last", "no-newline", "flow", "middle", "comment-behind", "absent"],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("start", ["", "---\n"], ids=["", "document"])
def test_other_lines_stay_as_they_are(tmp_path: Path, before: str, after: str, newline: str, start: str) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_bytes((start + PLAIN + before + after).replace("\n", newline).encode())
    assert run(path, "--recipe", "sync_bn", "--where", "b.*") == 0
    wanted = start + PLAIN + "distnorm_config:\n  recipe: sync_bn\n  where:\n  - b.*\n"
    blank = "\n" if before.endswith("\n\n") else ""  # it stands between two sections
    assert path.read_bytes().decode() == (wanted + blank + after).replace("\n", newline)
    assert run(path, "--remove") == 0
    assert path.read_bytes().decode() == (start + PLAIN + blank + after).replace("\n", newline)


def test_an_indented_file(tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text("  num_processes: 2\n  debug: false")
    assert run(path, *FLAGS) == 0
    assert path.read_text().startswith("  num_processes: 2\n  debug: false\n  distnorm_config:\n    recipe: group_bn\n")
    assert yaml.safe_load(path.read_text())["distnorm_config"] == SECTION


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "cfg.json"
    path.write_text('{"num_processes": 2, "debug": false}')
    assert run(path, *FLAGS) == 0
    assert json.loads(path.read_text()) == {"num_processes": 2, "debug": False, "distnorm_config": SECTION}
    assert run(path, "--remove") == 0
    assert json.loads(path.read_text()) == {"num_processes": 2, "debug": False}


def test_flags_change_what_they_name(config: Path) -> None:
    run(config, *FLAGS)
    assert run(config, "--no-ledger", "--option", "size=2") == 0
    assert yaml.safe_load(config.read_text())["distnorm_config"] == {
        "recipe": "group_bn",
        "options": {"size": 2},
        "where": ["backbone.*", "neck.0"],
    }
    assert run(config, "--recipe", "mabn") == 0  # size is no option of mabn
    assert yaml.safe_load(config.read_text())["distnorm_config"] == {
        "recipe": "mabn",
        "where": ["backbone.*", "neck.0"],
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--recipe", "sink_bn"],
            "recipe 'sink_bn' (did you mean 'sync_bn'?); allowed are local_bn, sync_bn, group_bn",
        ),
        (
            ["--recipe", "group_bn", "--option", "sizes=4"],
            "option 'sizes' (did you mean 'size'?); its options are size, axis",
        ),
        (["--recipe", "group_bn", "--option", "size"], "option 'size': need key=value, such as size=4"),
        (["--recipe", "group_bn", "--option", "size=[4"], "'[4' is not a value in YAML"),
        (["--recipe", "periodic_bn", "--option", "every=0"], "every"),
        (["--transport", "nccl"], 'transport must be "torch" or "mpi" or "shm" or "sockets" or "gloo"'),
        (["--remove"], "has no section distnorm_config"),
        (["--remove", "--ledger"], "do not give ledger"),
        ([], "has no section distnorm_config; write one with --recipe"),
    ],
)
def test_what_is_not_allowed_is_not_written(
    config: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, *flags) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("distnorm config: error: ") and not out
    assert config.read_text() == PLAIN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\nc: 2\n", "cfg.yaml, line 4: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "cfg.yaml, line 2: found character"),
        ("- 1\n", "cfg.yaml: need a mapping"),
        ("", "cfg.yaml: need a mapping"),
        ("distnorm_cfg: {}\n", "cfg.yaml: unknown key 'distnorm_cfg' (did you mean 'distnorm_config'?)"),
        (
            "distnorm_config: {recip: mabn}\n",
            "cfg.yaml, section distnorm_config: unknown key 'recip' (did you mean",
        ),
        ("distnorm_config: {recip: mabn}\n", "allowed are recipe, options, where, fuse, ledger, save_state, transport"),
        ("distnorm_config:\n", "cfg.yaml, section distnorm_config: need a mapping"),
        ("distnorm_config: {ledger: 3}\n", "cfg.yaml, section distnorm_config: ledger must be true or false; got 3"),
    ],
)
def test_a_wrong_file_is_named(config: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(text)
    assert run(config) == 2
    assert message in capsys.readouterr().err


def test_a_section_that_is_no_mapping_stays(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("distnorm_config: sync_bn\n")
    assert run(config, "--recipe", "mabn") == 2
    assert "need a mapping; allowed keys are recipe" in capsys.readouterr().err
    assert config.read_text() == "distnorm_config: sync_bn\n"


def test_a_wrong_value_is_mended_by_a_flag(config: Path) -> None:
    config.write_text("distnorm_config: {recipe: group_bn, options: 4}\n")
    assert run(config, "--option", "size=4") == 0
    assert yaml.safe_load(config.read_text())["distnorm_config"] == {"recipe": "group_bn", "options": {"size": 4}}


def test_a_file_that_is_no_text(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_bytes(b"\xff\xfe\x00")
    assert run(config) == 2
    assert f"{config} cannot be read" in capsys.readouterr().err


def test_a_layout_without_room(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("{num_processes: 2, debug: false}\n")
    assert run(config, *FLAGS) == 2
    assert "write one key per line" in capsys.readouterr().err
    assert config.read_text() == "{num_processes: 2, debug: false}\n"


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "gone.yaml", *FLAGS) == 2
    err = capsys.readouterr().err
    assert "gone.yaml is not a file" in err and "accelerate config --config_file" in err


def test_the_default_file_is_that_of_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.commands import config

    path = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config, "default_config_file", str(path))
    assert cli.main(["config", "--recipe", "mabn"]) == 2
    assert f"{path} does not exist: `accelerate config` creates it" in capsys.readouterr().err
    path.write_text(PLAIN)
    assert cli.main(["config", "--recipe", "mabn"]) == 0
    assert yaml.safe_load(path.read_text())["distnorm_config"] == {"recipe": "mabn"}


def test_without_flags_and_terminal_it_shows_what_stands_there(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config, *FLAGS)
    written = config.read_text()
    capsys.readouterr()
    assert run(config) == 0
    assert yaml.safe_load(capsys.readouterr().out.partition(":\n")[2]) == {"distnorm_config": SECTION}
    assert config.read_text() == written


@pytest.mark.parametrize(
    ("answers", "section"),
    [
        (["", "", "", "", "", "", ""], {"recipe": "sync_bn"}),
        (["group_bn", "size=4", "backbone.*, neck.0", "no", "yes", "no", "torch"], SECTION),
        (
            ["grop_bn", "group_bn", "", "sizes=4", "size=4", "backbone.*,neck.0", "perhaps", "y", "y", "y", "nccl", ""],
            SECTION | {"fuse": True, "save_state": True},
        ),
        (["group_bn(size=4)", "*", "", "no", "", "mpi"], {"recipe": "group_bn(size=4)", "transport": "mpi"}),
    ],
    ids=["defaults", "all", "corrected", "call"],
)
def test_questions(
    config: Path, answers: list[str], section: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    assert run(config) == 0
    assert sys.stdin.read() == ""
    assert yaml.safe_load(config.read_text())["distnorm_config"] == section
    assert config.read_text().startswith(PLAIN)


def test_questions_begin_with_what_stands_there(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config, *FLAGS)
    written = config.read_text()
    monkeypatch.setattr(sys, "stdin", Terminal("\n" * 7))
    assert run(config) == 0
    assert config.read_text() == written


def test_answers_that_end_write_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("mabn\n"))
    assert run(config) == 2
    assert "before all questions were answered; nothing was written" in capsys.readouterr().err
    assert config.read_text() == PLAIN


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("arguments", [["config", "--recipe", "mabn"], ["launch", "train.py"]])
def test_without_accelerate(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert "accelerate is not installed: pip install 'distnorm[accelerate]'" in err
