"""The fault table, row by row; the quick rows where `make test` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import apart, table
from tests.faults.faults import BY_NAME, FAULTS, TRANSPORTS
from tests.faults.judge import stopped
from tests.faults.runner import Runner


def rows() -> list[Any]:
    return [
        pytest.param(
            *(fault.name, *key),
            marks=[] if key == fault.quick else pytest.mark.slow,
            id="-".join((fault.name, *key)),
        )
        for fault in FAULTS
        for key in fault.keys
    ]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as started:
        yield started


@pytest.mark.parametrize(("fault", "transport", "recipe"), rows())
def test_row(runner: Runner, fault: str, transport: str, recipe: str) -> None:
    if BY_NAME[fault].apart and (why := apart.why_not()):
        pytest.skip(why)
    assert runner.run(fault, transport, recipe).wrong == []


def test_a_rank_that_is_stopped_notices_when_it_goes_on() -> None:
    """On idle cores, too: who is stopped has as much more time; the other one has not."""
    one, every = (BY_NAME[f"SIGSTOP of {which}, longer than the timeout"] for which in ("one rank", "all ranks"))
    assert [stopped(one, rank) for rank in range(2)] == [0.0, 5.0]
    assert [stopped(every, rank) for rank in range(2)] == [5.0, 5.0]
    assert stopped(BY_NAME["SIGKILL in forward"], 1) == 0.0


def test_the_page_has_every_row_and_none_that_is_wrong() -> None:
    page = table.PAGE.read_text()
    faults = [fault for fault in FAULTS if not (fault.apart and table.LEFT_OUT in page)]
    for transport in TRANSPORTS:
        assert page.count(f"| {transport} |") == sum(transport in fault.transports for fault in faults)
    for fault in faults:
        assert f"| {fault.name} | {table.demand(fault)} | {fault.transports[0]} |" in page
    assert "**wrong**" not in page


def test_rows_between_hosts_are_left_out_with_their_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin, end = table.markers("between-hosts")
    page = tmp_path / "faults.md"
    page.write_text(f"before\n{begin}\nrows\n{end}\nafter\n")
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda program: program)
    apart.why_not.cache_clear()
    assert table.write("between-hosts")
    apart.why_not.cache_clear()
    why = f"{table.LEFT_OUT}a network between hosts needs root."
    assert page.read_text() == f"before\n{begin}\n{why}\n{end}\nafter\n"
    assert why in capsys.readouterr().out
