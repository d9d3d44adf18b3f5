"""A folder with everything that a command touches: artifacts, a registry, caches, a recipe, temporary files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.paths import ROOT
from support.processes import members

INJECT = ROOT / "tests/chaos/inject"
LIMIT_S = 240.0
"""Limit for a command; those that wait for another's lease take up to two minutes."""

END_S = 60.0
"""Time in which processes of an ended command end: a compiler that an ended worker started ends by itself."""

TANDEM = "from pipeline.cli.main import main; main()"


@dataclass(frozen=True)
class Plan:
    """A disturbance of a process at one of its steps; step 0 disturbs nothing. `who`: the command, or its workers."""

    kind: str = "none"
    step: int = 0
    who: str = "main"


NOTHING = Plan()


@dataclass
class Done:
    """A command that has ended: its status (negative: a signal), what it said, its steps."""

    command: tuple[str, ...]
    status: int
    said: str
    steps: int
    was_disturbed: bool


@dataclass
class World:
    """A copy of the template, in which one command is disturbed."""

    root: Path
    control: Path
    environ: dict[str, str] = field(default_factory=dict)

    def path(self, *names: str) -> Path:
        return self.root.joinpath(*names)

    @property
    def registry(self) -> Path:
        return self.root / "registry"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def start(self, command: Sequence[str], plan: Plan = NOTHING) -> subprocess.Popen[str]:
        """Start a command of `tandem` in a session of its own."""
        shutil.rmtree(self.control, ignore_errors=True)
        self.control.mkdir()
        steps = {"kind": plan.kind, "step": plan.step, "who": plan.who, "control": str(self.control)}
        environ = {
            **os.environ, "PYTHONPATH": f"{INJECT}:{ROOT}", "PYTHONUTF8": "1", "TMPDIR": str(self.temporary),
            "TANDEM_CACHE": str(self.root / "cache"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "CHAOS_PLAN": json.dumps(steps), "CHAOS_WORLD": str(self.root), **self.environ,
        }  # fmt: skip
        for name in ("PYTHONWARNDEFAULTENCODING", "TANDEM_TEST_FORBIDS_COMPILER"):
            environ.pop(name, None)
        return subprocess.Popen(
            [sys.executable, "-c", TANDEM, *command], cwd=self.root, env=environ, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", preexec_fn=_heed_signals,
        )  # fmt: skip

    def run(self, command: Sequence[str], plan: Plan = NOTHING, meanwhile: Callable[[], None] = lambda: None) -> Done:
        """Run a command to its end. One that stops itself is continued after `meanwhile`."""
        process = self.start(command, plan)
        output: list[str] = []
        if plan.kind == "stop":
            if self._stopped(process):
                meanwhile()
            with contextlib.suppress(ProcessLookupError):  # it ended before the step
                os.kill(process.pid, signal.SIGCONT)
        try:
            output.append(process.communicate(timeout=LIMIT_S)[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output.append(f"{process.communicate()[0]}\nno end within {LIMIT_S:.0f} s")
        self.wait_for_end(process.pid)
        steps = self.control / "steps"
        return Done(
            tuple(command), process.returncode, "".join(output), int(steps.read_text()) if steps.is_file() else 0,
            (self.control / "done").is_file(),
        )  # fmt: skip

    @staticmethod
    def _stopped(process: subprocess.Popen[str]) -> bool:
        """Wait until a process has stopped itself; False if it ended before."""
        while process.poll() is None:
            if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return True
            time.sleep(0.01)
        return False

    @staticmethod
    def wait_for_end(session: int) -> None:
        """Wait until no process of a command's session runs.

        Raises:
            AssertionError: a process survives; it is ended.

        """
        deadline = time.monotonic() + END_S
        while left := members(session):
            if time.monotonic() > deadline:
                names = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:150] for pid in left]
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"processes survive the command: {names}")
            time.sleep(0.02)


def _heed_signals() -> None:
    """Take Ctrl-C and SIGTERM as a command in a terminal does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
