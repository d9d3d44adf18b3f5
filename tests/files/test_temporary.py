"""The folder for temporary files: by path, permission and mount, the same one for the same environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import HostError
from pipeline.files import temporary
from pipeline.files.temporary import own_folder, prepared_folder, problems, temporary_files, temporary_folder
from support.paths import ROOT
from support.small_disk import on_small_disk


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a shorter path than pytest's, which is too long for sockets in parallel runs."""
    with tempfile.TemporaryDirectory(prefix="tandem-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*temporary.VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_temporary_folder_is_that_of_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_folder() == tmp_path
    monkeypatch.delenv("TMPDIR")
    assert temporary_folder() == Path("/tmp")


@pytest.mark.parametrize(
    "name", ["a b", "a'b", 'a"b', "a$b", "a;b", "é", "a\tb", "a\\b", "a`b", "a(b", "a\nb", "x" * 99, "missing", "file"]
)
def test_temporary_folder_skips_an_unusable_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compilation failed: Inductor splits its command lines at spaces and reads quotes."""
    path = tmp_path / name
    if name == "file":
        path.touch()
    elif name != "missing":
        path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    assert temporary_folder() == Path("/tmp")
    monkeypatch.setenv("TEMP", str(tmp_path))
    assert temporary_folder() == tmp_path


def test_temporary_folder_skips_one_where_our_folder_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts in it are executed, and another user could have prepared them."""
    own_folder(tmp_path).symlink_to("/elsewhere")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_folder() == Path("/tmp")


def test_temporary_folder_names_the_fault_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    (tmp_path / "a b").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a b"))
    with pytest.raises(HostError) as caught:
        temporary_folder()
    assert f"`{tmp_path}/a b` (its path has spaces" in caught.value.what
    assert f"`{tmp_path}/none` (missing), `relative` (not an absolute path)" in caught.value.what
    assert caught.value.fix.startswith("set TMPDIR")
    assert problems() == list(caught.value.problems)


def test_temporary_folder_skips_a_mount_that_executes_nothing() -> None:
    """Compiled graphs could not be loaded: `failed to map segment from shared object`."""
    code = """
        import os, pathlib
        os.environ["TMPDIR"] = "/mnt"
        from pipeline.files import temporary
        print(temporary.fault(pathlib.Path("/mnt")), temporary.temporary_folder(), sep=", ")
    """
    assert on_small_disk("mount -o remount,noexec /mnt", code).strip() == "mounted noexec, /tmp"


def test_problems_names_a_full_disk() -> None:
    code = """
        import os
        os.environ["TMPDIR"] = "/mnt"
        from pipeline.files.temporary import problems
        (problem,) = problems()
        print(problem.where, problem.what, sep=": ")
    """
    assert on_small_disk("true", code).startswith("TMPDIR: 0 MiB free in `/mnt`; the compiler needs about")


def test_prepared_folder_is_closed_to_others(tmp_path: Path) -> None:
    """Scripts in it are executed."""
    before = os.umask(0)
    try:
        assert prepared_folder(tmp_path) == own_folder(tmp_path)
    finally:
        os.umask(before)
    assert own_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    assert prepared_folder(tmp_path).is_dir()


@pytest.mark.parametrize("setting", [None, "/before"])
def test_temporary_files_are_in_the_folder_meanwhile(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        monkeypatch.setenv("TMPDIR", setting)
    with temporary_files(tmp_path):
        assert os.environ["TMPDIR"] == str(tmp_path)
        assert tempfile.gettempdir() == str(tmp_path)
    assert os.environ.get("TMPDIR") == setting
    assert tempfile.gettempdir() != str(tmp_path)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_of_ours_that_others_can_write_to_is_skipped(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precompiled headers in it go into every graph."""
    own_folder(tmp_path).mkdir()
    own_folder(tmp_path).chmod(mode)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_folder() != tmp_path
    assert "others can write to" in temporary.fault(tmp_path)
    own_folder(tmp_path).chmod(0o750)
    assert temporary_folder() == tmp_path


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_folder(tmp_path).mkdir(mode=0o700)
    os.chown(own_folder(tmp_path), 65534, 65534)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_folder() != tmp_path


BLOCKED = """
import multiprocessing, pathlib, signal
from multiprocessing import forkserver
from pipeline.files.temporary import start_server
multiprocessing.get_context("forkserver")
start_server()
def blocked(pid):
    line = next(l for l in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if l.startswith("SigBlk"))
    return bool(int(line.split()[1], 16) >> signal.SIGINT - 1 & 1)
print(blocked(forkserver._forkserver._forkserver_pid), blocked("self"))
"""


def test_start_server_keeps_ctrl_c_from_the_server() -> None:
    """Ctrl-C in the first seconds printed 120 lines of traceback: the server was importing torch."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "True False\n", done.stderr


START = "import os, signal; from pipeline.files.temporary import start_server; start_server()"


def started(folder: Path, then: str = "pass") -> subprocess.CompletedProcess[bytes]:
    """A process with this TMPDIR, which has started the server."""
    environ = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", f"{START}; {then}"], env=environ, check=False, capture_output=True)


def test_sockets_of_a_killed_process_are_swept() -> None:
    """A killed build left multiprocessing's folder in TMPDIR, and nothing removed it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        assert started(Path(folder), "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
        assert list(Path(folder).iterdir())
        done = started(Path(folder))
        assert (done.returncode, done.stderr) == (0, b"")
        assert list(Path(folder).iterdir()) == []


def test_sockets_are_not_in_a_folder_whose_path_is_too_long_to_be_swept(tmp_path: Path) -> None:
    folder = tmp_path / "with-a-long-name"
    folder.mkdir()
    assert started(folder, "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    assert list(folder.iterdir()) == []
