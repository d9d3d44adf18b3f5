"""Runs when Python starts, in every process of a command under test: counts its steps, and disturbs it at one of them.

A step is an access to a file below CHAOS_WORLD (open, rename, link, remove, sync and the like) or the start of a
process. CHAOS_PLAN is JSON: `kind`, `step` (0: only count), `who` (main, worker), `control` (a folder elsewhere).
The same command has the same steps, so a step replays a disturbance, which a time would not.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import signal
import sys
import time

FILES = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime",
    "os.chmod", "os.scandir", "os.listdir",
}  # fmt: skip
PROCESSES = {"subprocess.Popen", "os.fork", "os.posix_spawn"}
SLOW_S, SLOW_STEPS = 0.02, 150
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT, "stop": signal.SIGSTOP}
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}
CLOCK_S = 400 * 24 * 3600.0


class Steps:
    """The steps of this process and of those that it forks."""

    def __init__(self, plan: dict, world: str) -> None:
        self.plan, self.world = plan, world
        self.number, self.slow = itertools.count(1), 0
        self.inside = False

    def hook(self, event: str, args: tuple) -> None:
        """Be called for every audit event of the interpreter."""
        if self.inside or (event not in FILES and event not in PROCESSES):
            return
        if event in FILES and not self._is_ours(args):
            return
        self.step()

    def _is_ours(self, args: tuple) -> bool:
        """Return whether a path is in the world, which is the working directory."""
        paths = [os.fsdecode(each) for each in args[:2] if isinstance(each, str | bytes)]
        return any(path.startswith(self.world) or not path.startswith("/") for path in paths[:1])

    def step(self) -> None:
        """Count a step, and disturb the process if it is the one."""
        number = next(self.number)
        if self.slow:
            self.slow -= 1
            time.sleep(SLOW_S)
        if number == self.plan["step"] and self._is_the_one():
            self.inside = True
            try:
                self.disturb()
            finally:
                self.inside = False

    def _is_the_one(self) -> bool:
        """Return whether this is the process to disturb, the first to come so far."""
        is_main = os.getpid() == os.getsid(0)
        if is_main != (self.plan["who"] == "main"):
            return False
        self.inside = True
        try:
            os.close(os.open(os.path.join(self.plan["control"], "done"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        finally:
            self.inside = False
        return True

    def disturb(self) -> None:
        """Disturb this process."""
        kind = self.plan["kind"]
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind in ERRORS:
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
        elif kind == "slow":
            self.slow = SLOW_STEPS
        elif kind in ("future", "past"):
            jump_s, now = CLOCK_S if kind == "future" else -CLOCK_S, time.time
            time.time = lambda: now() + jump_s

    def write_count(self) -> None:
        """Write the number of steps of the main process."""
        if os.getpid() == os.getsid(0):
            self.inside = True
            with pathlib.Path(os.path.join(self.plan["control"], "steps")).open("w") as file:
                file.write(str(next(self.number) - 1))


def _install() -> None:
    import atexit

    steps = Steps(json.loads(os.environ["CHAOS_PLAN"]), os.environ["CHAOS_WORLD"])
    sync = os.fsync

    def counted_sync(handle: int) -> None:
        if not steps.inside:
            steps.step()
        sync(handle)

    os.fsync = counted_sync
    atexit.register(steps.write_count)
    sys.addaudithook(steps.hook)


if "CHAOS_PLAN" in os.environ:
    with contextlib.suppress(KeyError):
        _install()
