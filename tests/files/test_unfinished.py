"""Two containers of one host name share a disk: a writer that lives is recognised by its lock, not by its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.files import unfinished
from pipeline.files.atomic import atomic_dir, atomic_file, write_atomic
from pipeline.files.unfinished import TEMP, sweep, temp_folder
from support.paths import ROOT

WRITERS = {
    "folder": "from pipeline.files.atomic import atomic_dir as writer",
    "file": "from pipeline.files.atomic import atomic_file as writer",
}


@pytest.fixture(params=WRITERS)
def writer(request, tmp_path):
    """A process that writes `out` and waits."""
    code = f"{WRITERS[request.param]}\nfrom pathlib import Path\nimport sys\n" + (
        "with writer(Path(sys.argv[1]) / 'out'):\n    print('writing', flush=True)\n    sys.stdin.read(1)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def temps(folder: Path) -> list[Path]:
    return list(folder.glob(f"{TEMP}*"))


def test_sweep_keeps_a_locked_name_of_a_dead_process_number(writer, tmp_path, monkeypatch):
    """In another PID namespace with the same host name, the live writer's process does not exist."""
    monkeypatch.setattr(unfinished, "_running", lambda pid: False)
    (temp,) = temps(tmp_path)
    os.utime(temp, (0, 0))
    sweep(tmp_path)
    assert temps(tmp_path) == [temp]
    writer.communicate("x")
    assert writer.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sweep_removes_what_a_killed_writer_left(writer, tmp_path):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(temps(tmp_path)) == 1
    sweep(tmp_path)
    assert temps(tmp_path) == []


@pytest.mark.parametrize("kind", [atomic_dir, atomic_file])
def test_a_name_that_was_swept_before_its_lock_is_made_again(kind, tmp_path, monkeypatch):
    """Between the creation and the lock of a name, another container may take it for a dead one's."""
    hold, swept = unfinished._hold, []

    def late(handle: int, temp: Path) -> bool:
        if not swept:
            swept.append(temp)
            unfinished.remove(temp)
        return hold(handle, temp)

    monkeypatch.setattr(unfinished, "_hold", late)
    with kind(tmp_path / "out") as found:
        if kind is atomic_dir:
            (found / "file").write_text("")
    assert len(swept) == 1
    assert (tmp_path / "out").exists()
    assert temps(tmp_path) == []


def test_without_locks_only_age_counts(tmp_path, monkeypatch):
    """A disk without flock: a name of this host is kept for a day, since its writer may live elsewhere."""

    def unsupported(*_: object) -> None:
        raise OSError(95, "not supported")

    dead = subprocess.Popen(["true"])
    dead.wait()
    monkeypatch.setattr(unfinished.fcntl, "flock", unsupported)
    young, old = (tmp_path / f"{TEMP}{unfinished._host()}-{dead.pid}-{age}-file" for age in ("young", "old"))
    for path in (young, old):
        path.touch()
    os.utime(old, (time.time() - 2 * unfinished.FOREIGN_AGE_S,) * 2)
    sweep(tmp_path)
    assert temps(tmp_path) == [young]
    write_atomic(tmp_path / "new", b"x")


def test_temp_folder_is_removed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), temp_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_work_folder_of_a_killed_process_is_swept_by_the_next(tmp_path):
    """Nothing swept TMPDIR: the folders of killed builds stayed there."""
    code = (
        "from pipeline.files.unfinished import work_folder\nfrom pathlib import Path\nimport os, signal, sys\n"
        "with work_folder('compile', Path(sys.argv[1])) as folder:\n"
        "    (folder / 'file').write_text('')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    (left,) = temps(tmp_path)
    assert left.stat().st_mode & 0o777 == 0o700
    with unfinished.work_folder("compile", tmp_path) as mine:
        assert temps(tmp_path) == [mine]
    assert temps(tmp_path) == []


def test_a_fork_removes_nothing_of_its_parent(tmp_path):
    """A process that multiprocessing forks collects the parent's open generators: their folders were gone."""
    with ExitStack() as stack:
        folder = stack.enter_context(temp_folder(tmp_path / "folder"))
        file, _ = stack.enter_context(unfinished.temp_file(tmp_path / "file"))
        child = os.fork()
        if child == 0:
            stack.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert folder.is_dir()
        assert file.is_file()
    assert list(tmp_path.iterdir()) == []
