"""File systems of their own for worlds, which can be full or read-only. Only root may mount them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

from chaos.world import World

MOUNTED_BYTES = 256 << 20
"""Space in a world of its own: a build asks for 128 MiB."""


def remount(world: World, mode: str) -> None:
    """Change a file system; one with a file that is open for writing stays as it is."""
    done = subprocess.run(["mount", "-o", f"remount,{mode}", str(world.root)], capture_output=True, text=True)
    assert done.returncode == 0 or "busy" in done.stderr, done.stderr


@contextlib.contextmanager
def mounted(world: World) -> Iterator[None]:
    """Give the world a file system of its own."""
    copy = world.root.with_name("on-disk")
    shutil.copytree(world.root, copy, symlinks=True)
    used = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={used + MOUNTED_BYTES}", "tmpfs", str(world.root)], check=True)
    try:
        shutil.copytree(copy, world.root, dirs_exist_ok=True, symlinks=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(world.root)], check=True)
        shutil.rmtree(copy)


def may_mount() -> bool:
    """Return whether this user may mount file systems."""
    return os.geteuid() == 0 and shutil.which("mount") is not None
