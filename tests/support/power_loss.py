"""A disk that loses power at the nth write to it that counts, or fails there; only what was synced is left.

The model is POSIX's, stricter than any file system: bytes of a file are durable after its fsync, entries of a folder
after that of the folder. What was not synced may be there or not, so it is cut in several ways:

    lost      nothing that was not synced is there
    names     every name is there, and bytes only as they were synced: a rename came through before its file's bytes
    some      of each folder either the synced entries are there or all, by a seed
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import atomic, unfinished

CUTS = ("lost", "names", "some")
RENAMES = ("rename", "replace", "link")


class PowerLoss(BaseException):
    """The end of the machine: nothing may catch it and go on."""


class Disk:
    """The folder `root`, observed through os.fsync and renames; `at` is the step that is cut or fails, 0 for none."""

    def __init__(self, root: Path, at: int, how: str) -> None:
        self.root, self.at, self.how = root, at, how
        self.steps, self.is_lost = 0, False
        self.lock = threading.RLock()
        self.bytes: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self.handles: list[int] = []
        self.image: dict[str, bytes | None] = {}
        for folder, _, names in os.walk(root):
            self._keep(Path(folder))
            for name in names:
                self._keep(Path(folder, name))

    def close(self) -> None:
        """Release the inode numbers that were held."""
        for handle in self.handles:
            os.close(handle)

    def step(self) -> None:
        """Count a step; cut the power, or fail, if it is the one."""
        with self.lock:
            if self.is_lost:
                raise PowerLoss
            self.steps += 1
            if self.steps != self.at:
                return
            if self.how == "fails":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self.is_lost = True
            chance = random.Random(self.at)
            self.image = dict(self._left(self.root, "", chance))
            raise PowerLoss

    def synced(self, handle: int) -> None:
        """Record what an fsync made durable."""
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_relative_to(self.root):
            with self.lock:
                self._keep(path)

    def _keep(self, path: Path) -> None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return
        self.handles.append(handle)  # so that no other file gets its number
        number = os.fstat(handle).st_ino
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.entries[number] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.bytes[number] = path.read_bytes()

    def _left(self, folder: Path, prefix: str, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
        """Yield what is left, by its path; None for a folder."""
        now = {entry.name: entry.inode() for entry in os.scandir(folder)}
        yield from self._left_of(folder.stat().st_ino, now, prefix, chance)

    def _left_of(
        self, number: int, now: dict[str, int], prefix: str, chance: random.Random
    ) -> Iterator[tuple[str, bytes | None]]:
        synced = self.entries.get(number, {})
        all_names = self.how == "names" or (self.how == "some" and chance.random() < 0.5)
        for name, inode in (now if all_names else synced).items():
            path = f"{prefix}{name}"
            if inode in self.folders():
                yield path, None
                yield from self._left_of(inode, self.folders()[inode], f"{path}/", chance)
            else:
                yield path, self.bytes.get(inode, b"")

    def folders(self) -> dict[int, dict[str, int]]:
        """The entries of every folder, as they are now; of a removed one, as they were synced."""
        found = dict(self.entries)
        for folder, _, _ in os.walk(self.root):
            found[Path(folder).stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(folder)}
        return found

    def restart(self) -> None:
        """Put what is left in the place of the folder, as after the start of the machine."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, data in self.image.items():
            place = self.root / path
            if data is None:
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)


@contextmanager
def observed(root: Path, at: int, how: str) -> Iterator[Disk]:
    """Observe a folder during the block; at its end, after a power loss, only what is left of it is there."""
    disk = Disk(root, at, how)
    with pytest.MonkeyPatch.context() as patch:
        fsync = os.fsync

        def synced(handle: int) -> None:
            disk.step()
            fsync(handle)
            disk.synced(handle)

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **options: Any) -> Any:
                disk.step()
                return call(*args, **options)

            return wrapper

        patch.setattr(os, "fsync", synced)
        for name in RENAMES:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(atomic, "_rename", counted(atomic._rename))
        try:
            yield disk
        except PowerLoss:
            assert disk.is_lost
        except OSError:
            assert how == "fails"
        finally:
            disk.close()
    if disk.is_lost:
        disk.restart()
    unfinished.sweep_once.cache_clear()
