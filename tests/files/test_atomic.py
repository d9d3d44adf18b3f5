"""Writers that are killed, disks that are full or read-only, and paths that must not leave their folder."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError, HostError
from pipeline.files import atomic as files
from pipeline.files import unfinished
from pipeline.files.atomic import (
    atomic_dir,
    atomic_file,
    create_only,
    link_or_copy,
    resumable_dir,
    safe_relative,
    write_atomic,
)
from pipeline.files.unfinished import TEMP, sweep
from support.small_disk import on_small_disk, run_python


def temps(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{TEMP}*"))


REPORT = """
    import sys
    from pathlib import Path
    from pipeline.errors import HostError
    from pipeline.files.atomic import atomic_dir, write_atomic, check_space
    def failing(act):
        try:
            act()
        except HostError as error:
            print(error, "|", error.fix)
        else:
            print("no error")
        print(sorted(p.name for p in Path("/mnt").rglob("*")))
"""


def test_write_atomic_full_disk():
    code = """
    write_atomic(Path("/mnt/old"), b"old")
    failing(lambda: write_atomic(Path("/mnt/old"), b"x" * 200_000))
    assert Path("/mnt/old").read_bytes() == b"old"
    """
    lines = on_small_disk("true", REPORT + code).splitlines()
    assert lines[0].startswith("/mnt/old: cannot write: No space left on device; ")
    assert "bytes are free" in lines[0]
    assert "free space" in lines[0]
    assert lines[1] == "['old']"


def test_atomic_dir_full_disk():
    code = """
    def act():
        with atomic_dir(Path("/mnt/folder")) as folder:
            (folder / "small").write_bytes(b"x")
            (folder / "large").write_bytes(b"x" * 200_000)
    failing(act)
    """
    lines = on_small_disk("true", REPORT + code).splitlines()
    assert "No space left on device" in lines[0]
    assert lines[1] == "[]"


def test_write_atomic_read_only_disk():
    code = """
    failing(lambda: write_atomic(Path("/mnt/new"), b"x"))
    failing(lambda: write_atomic(Path("/mnt/folder/new"), b"x"))
    """
    lines = on_small_disk("mount -o remount,ro /mnt", REPORT + code).splitlines()
    for line in lines[::2]:
        assert "Read-only file system" in line
        assert "use a folder with write permission" in line


def test_write_atomic_beyond_file_size_limit(tmp_path):
    """Runs anywhere: a limit on file sizes fails a write in the middle, like a full disk."""
    code = f"""
    import resource
    from pathlib import Path
    from pipeline.errors import HostError
    from pipeline.files.atomic import write_atomic
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_atomic(Path({str(tmp_path / "file")!r}), b"x" * 5000)
    except HostError as error:
        print(error.what)
    """
    done = run_python(code)
    assert "File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def _refused_write(path: Path) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        write_atomic(path, b"x")
    except HostError as error:
        os._exit(0 if "Permission denied" in error.what and str(path.parent) in error.where else 2)
    os._exit(1)


def test_write_atomic_forbidden_folder(tmp_path):
    """Root may write anywhere, so the write runs as nobody."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    for parent in [tmp_path, *list(tmp_path.parents)[:2]]:
        parent.chmod(parent.stat().st_mode | 0o011)
    process = multiprocessing.get_context("fork").Process(target=_refused_write, args=(folder / "file",))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(folder.iterdir()) == []


def test_check_space_names_needed_and_free(tmp_path):
    with pytest.raises(HostError, match=r"9,000,000,000,000,000 bytes needed, [\d,]+ free"):
        files.check_space(tmp_path / "not" / "yet", 9_000_000_000_000_000)


def test_atomic_file_error_keeps_old(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert temps(tmp_path) == []


def test_write_atomic_long_name(tmp_path):
    path = tmp_path / ("n" * 250)
    write_atomic(path, b"x")
    assert path.read_bytes() == b"x"


@pytest.mark.parametrize("there", ["nothing", "folder", "file", "link"])
def test_atomic_dir_replaces(tmp_path, there):
    path, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("")
    if there == "folder":
        path.mkdir()
        (path / "old").write_text("")
    elif there == "file":
        path.write_text("")
    elif there == "link":
        path.symlink_to(other)
    with atomic_dir(path) as folder:
        (folder / "new").write_text("")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert not path.is_symlink()
    assert [p.name for p in other.iterdir()] == ["kept"]
    assert temps(tmp_path) == []


def test_atomic_dir_without_exchange(tmp_path, monkeypatch):
    """Some disks cannot exchange two folders; their answer is all that is replaced here."""
    monkeypatch.setattr(files, "_rename", lambda *a: False)
    for text in ("one", "two"):
        with atomic_dir(tmp_path / "out") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "out" / "file").read_text() == "two"
    assert temps(tmp_path) == []


def _write_dirs(path: Path, text: str) -> None:
    for _ in range(12):
        with atomic_dir(path) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(text)


def test_atomic_dir_killed_and_raced(tmp_path):
    """Two writers of one folder are killed at random moments: there is always one whole folder, and no litter stays."""
    path = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    with atomic_dir(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("0")
    for delay_s in (0.01, 0.03, 0.05, 0.08):
        writers = [context.Process(target=_write_dirs, args=(path, text)) for text in "12"]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline:
            assert path.is_dir()
            time.sleep(0.001)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        assert sorted(p.name for p in path.iterdir()) == ["a", "b"]
        assert (path / "a").read_text() == (path / "b").read_text()
    sweep(tmp_path)
    assert temps(tmp_path) == []


def test_sweep_keeps_the_living_and_the_foreign(tmp_path):
    """A process number says nothing about another container that shares the disk."""
    host = unfinished._host()
    dead = subprocess.Popen(["true"])
    dead.wait()
    living = tmp_path / f"{TEMP}{host}-{os.getpid()}-1-file"
    foreign = tmp_path / f"{TEMP}other-{dead.pid}-1-file"
    old = tmp_path / f"{TEMP}other-{dead.pid}-2-file"
    mine = tmp_path / f"{TEMP}{host}-{dead.pid}-1-file"
    for path in (living, foreign, old, mine):
        path.write_text("")
    os.utime(old, (0, 0))
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {living, foreign}


def _create(folder: Path, number: int, start, wins) -> None:
    start.wait()
    wins.put([name for name in range(12) if create_only(folder / str(name), str(number).encode())])


def test_create_only_has_one_winner(tmp_path):
    context = multiprocessing.get_context("fork")
    start, wins = context.Barrier(4), context.SimpleQueue()
    writers = [context.Process(target=_create, args=(tmp_path, number, start, wins)) for number in range(4)]
    for writer in writers:
        writer.start()
    won = sorted(name for _ in writers for name in wins.get())
    for writer in writers:
        writer.join()
    assert won == list(range(12))
    assert temps(tmp_path) == []


def test_link_or_copy_follows_links(tmp_path):
    """Hubs keep files behind links; a link inside an artifact would lead out of it."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    link_or_copy(tmp_path / "link", tmp_path / "folder" / "new")
    assert not (tmp_path / "folder" / "new").is_symlink()
    assert (tmp_path / "folder" / "new").samefile(tmp_path / "file")


def test_link_or_copy_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "file").write_text("x")
    link_or_copy(tmp_path / "file", tmp_path / "new")
    assert (tmp_path / "new").read_text() == "x"


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "..", "../x", "a/../../x", "a/./b", "a//b", "./a", "a/", "a\\..\\b", "a\0b", "a\nb", "\ud800"],
)
def test_safe_relative_refuses(path):
    with pytest.raises(ArtifactError, match="unsafe path"):
        safe_relative(path, "manifest.json")


@pytest.mark.parametrize("path", ["a", "a/b-1.2/c_d", "..a/b..", "weights/target/rank-0-of-1.safetensors", "ü"])
def test_safe_relative_accepts(path):
    assert safe_relative(path, "manifest.json").as_posix() == path


@pytest.mark.parametrize("there", ["a file in it", ""])
def test_atomic_dir_that_may_not_replace(tmp_path, there):
    """What comes to be at its place while it is built stays, and nothing is left aside."""
    aside, place = tmp_path / "aside", tmp_path / "deep" / "place"
    aside.mkdir()
    with (
        pytest.raises(ArtifactError, match="another process; not"),
        atomic_dir(place, replace=False, aside=aside) as folder,
    ):
        assert folder.parent == aside
        (folder / "name").write_text("new")
        place.mkdir()
        if there:
            (place / "other").write_text(there)
    assert not (place / "name").exists()
    assert not list(aside.iterdir())


@pytest.mark.parametrize(
    ("error", "kept"), [(HostError("no network"), True), (KeyboardInterrupt(), True), (ValueError(), False)]
)
def test_resumable_dir_keeps_what_can_be_continued(tmp_path: Path, error: BaseException, kept: bool) -> None:
    with pytest.raises(type(error)), resumable_dir(tmp_path / "key") as folder:
        (folder / "half").write_text("first")
        raise error
    assert not (tmp_path / "key").exists()
    with resumable_dir(tmp_path / "key") as folder:
        assert (folder / "half").exists() == kept
        (folder / "rest").write_text("second")
    assert (tmp_path / "key" / "rest").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
