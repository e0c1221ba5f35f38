"""The cache of the compiled kernels: what it finds broken, where it cannot be, and what a killed compile leaves."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distnorm.kernels import library_cache, native

Report = pytest.LogCaptureFixture
FLAGS = ("-O0", "-shared", "-fPIC")  # quick to compile
# Without the package's own __init__, which imports torch.
LINE = f"""
import sys, types
package = sys.modules["distnorm"] = types.ModuleType("distnorm")
package.__path__ = [{str(Path(native.__file__).parents[1])!r}]
from distnorm.kernels import native
native.FLAGS = {FLAGS}
sys.exit(native.library() is None)
"""


def build() -> object:
    return native.library.__wrapped__()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", FLAGS)


def kept(home: Path) -> list[Path]:
    return sorted((home / "distnorm").iterdir())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the library in it."""
    home = tmp_path_factory.mktemp("filled")
    environment = {**os.environ, "XDG_CACHE_HOME": str(home)}
    subprocess.run([sys.executable, "-c", LINE], env=environment, check=True)
    return home


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, filled: Path) -> Path:
    """A copy of it, in use."""
    home = tmp_path / "home"
    shutil.copytree(filled, home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.delenv("CC", raising=False)
    return home


def compiler(folder: Path, script: str) -> str:
    """A compiler of our own."""
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_a_sound_library_is_loaded_as_it_is(home: Path, caplog: Report) -> None:
    (file,) = kept(home)
    assert re.fullmatch(r"kernels-[0-9a-f]{16}-[0-9a-f]{16}\.so", file.name)
    written = file.stat().st_mtime_ns
    assert build() is not None
    assert kept(home) == [file] and file.stat().st_mtime_ns == written
    assert not caplog.records


# --- what is broken ------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:8192])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path) -> None:
    file.write_bytes(b"no library" * 1000)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def unreadable(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def foreign(file: Path) -> None:
    """Somebody's else library under its name."""
    source = file.with_suffix(".c")
    source.write_text("int foreign(void) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(file), str(source)], check=True)
    source.unlink()


def foreign_with_its_digest(file: Path) -> None:
    foreign(file)
    file.rename(file.with_name(library_cache._name(file.name.split("-")[1], file.read_bytes())))


@pytest.mark.parametrize(
    "harm",
    [truncate, empty, garbage, flip, unreadable, foreign, foreign_with_its_digest],
    ids=lambda each: each.__name__,
)
def test_what_is_broken_is_made_anew(home: Path, harm: Callable[[Path], None]) -> None:
    """In a process of its own: a truncated library ends one by SIGBUS."""
    (file,) = kept(home)
    content = file.read_bytes()
    harm(file)
    subprocess.run([sys.executable, "-c", LINE], check=True)
    assert kept(home) == [file] and file.read_bytes() == content


# --- where it cannot be cached -------------------------------------------------------------------


def one_warning(caplog: Report, *words: str) -> None:
    (record,) = (each for each in caplog.records if each.name == "distnorm")
    assert record.levelno == logging.WARNING
    for word in words:
        assert word in record.getMessage()


def test_a_folder_that_cannot_be_made(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report) -> None:
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert build() is not None
    one_warning(caplog, "cannot be cached", "XDG_CACHE_HOME", "Not a directory", str(home / "file"))


def test_a_folder_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report) -> None:
    """Root may write anywhere, so a folder of /proc stands for it."""
    monkeypatch.setattr(library_cache, "_cache_folder", lambda environment: Path("/proc/self"))
    assert build() is not None
    one_warning(caplog, "cannot be cached", "/proc/self")


def test_a_kept_library_serves_from_a_folder_that_cannot_be_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report
) -> None:
    monkeypatch.setattr(library_cache, "_made", None)
    assert build() is not None
    assert not caplog.records


def test_a_full_disk(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report, tmp_path: Path) -> None:
    full = 'case "$TMPDIR" in *home*) echo "No space left on device" >&2; exit 1;; esac; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, full))
    before = kept(home)
    assert build() is not None
    one_warning(caplog, "cannot be cached", "No space left on device")
    assert kept(home) == before


@pytest.mark.parametrize("named", [None, "", "relative/cache"])
def test_no_home(monkeypatch: pytest.MonkeyPatch, caplog: Report, named: str | None) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert build() is not None
    one_warning(
        caplog, "cannot be cached", "HOME and XDG_CACHE_HOME are not set", "Could not determine home directory."
    )


# --- the compiler --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["gcc -m64", "'{own}' -O1", "env LANG=C gcc"])
def test_the_words_of_cc(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report, tmp_path: Path, words: str
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.setenv("CC", words.format(own=compiler(folder, 'exec cc "$@"')))
    assert build() is not None
    assert not caplog.records
    assert len(kept(home)) == 2


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_cc_is_none(home: Path, monkeypatch: pytest.MonkeyPatch, blank: str) -> None:
    monkeypatch.setenv("CC", blank)
    assert build() is not None
    assert len(kept(home)) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("false", "non-zero exit status 1"),
        ("no-such-compiler -m64", "no-such-compiler"),
        ("gcc '", 'CC="gcc \'" is not a command: No closing quotation'),
        ("true", "kernels.so"),
        ("gcc -no-such-flag", "unrecognized"),
    ],
)
def test_a_compiler_that_does_not_work(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report, words: str, told: str
) -> None:
    monkeypatch.setenv("CC", words)
    assert build() is None
    one_warning(caplog, "could not be compiled; using ATen's", told)
    assert len(kept(home)) == 1


def test_a_compiler_that_makes_something_else(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report, tmp_path: Path
) -> None:
    (tmp_path / "foreign.c").write_text("int foreign(void) { return 1; }")
    ask = '[ "$1" = --version ] && exec cc --version; '
    script = ask + f'while [ $# -gt 1 ]; do shift; done; exec cc -shared -fPIC -o "$1" {tmp_path}/foreign.c'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    assert build() is None
    one_warning(caplog, "could not be compiled; using ATen's", "is not distnorm's library")
    assert len(kept(home)) == 1


def test_a_compiler_that_takes_too_long_is_ended_with_all_that_it_started(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Report, tmp_path: Path
) -> None:
    monkeypatch.setattr(library_cache, "COMPILE_SECONDS", 2)
    monkeypatch.setenv("CC", compiler(tmp_path, 'sleep 600 & echo $! > "$0.pid"; wait'))
    began = time.monotonic()
    assert build() is None
    assert time.monotonic() - began < 60
    one_warning(caplog, "could not be compiled; using ATen's", "timed out")
    state = Path(f"/proc/{int((tmp_path / 'compiler.pid').read_text())}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # a signal takes its time
        time.sleep(0.05)


@pytest.mark.parametrize("what", ["compiler", "flags", "machine", "libc", "processor"])
def test_what_the_key_tells_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    own = compiler(tmp_path, "echo 'cc 1.0'")
    before = library_cache._key([own], ["-O3"], [])
    assert before == library_cache._key([own], ["-O3"], [])
    if what == "compiler":
        compiler(tmp_path, "echo 'cc 2.0'")
    if what == "machine":
        monkeypatch.setattr("platform.machine", lambda: "m68k")
    if what == "libc":
        monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "1.0"))
    if what == "processor":
        monkeypatch.setattr(library_cache, "_processor", lambda: "flags: sse")
    assert before != library_cache._key([own], ["-O2" if what == "flags" else "-O3"], [])


# --- several processes ---------------------------------------------------------------------------


def start(home: Path, **variables: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), **variables}
    return subprocess.Popen([sys.executable, "-c", LINE], env=environment, start_new_session=True)


def test_two_at_once_and_what_a_killed_compile_leaves(
    monkeypatch: pytest.MonkeyPatch, filled: Path, tmp_path: Path
) -> None:
    """One is killed while it compiles, with leftovers of a whole compile; the others do not mind."""
    slow = compiler(tmp_path, '[ "$1" = --version ] || { touch "$0.runs"; sleep 600; }; exec cc "$@"')
    killed = start(tmp_path, CC=slow)
    while not (tmp_path / "compiler.runs").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    left = [each for each in kept(tmp_path) if each.is_dir()]
    assert len(left) == 1
    both = [start(tmp_path), start(tmp_path)]
    assert [each.wait() for each in both] == [0, 0]
    assert left[0].exists()  # its process lives
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build() is not None
    assert [each.name for each in kept(tmp_path)] == [each.name for each in kept(filled)]


def test_folders_of_other_machines_are_swept_when_they_are_old(home: Path) -> None:
    folders = [home / "distnorm" / f"distnorm-build-{machine}-1-x" for machine in ("0000aaaa", "0000bbbb")]
    for folder in folders:
        folder.mkdir()
    long_ago = time.time() - 2 * library_cache.FORGOTTEN_SECONDS
    os.utime(folders[0], (long_ago, long_ago))
    assert build() is not None
    assert [folder.exists() for folder in folders] == [False, True]
