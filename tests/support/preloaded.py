"""Python code in processes that have torch and transformers already: forks of one server, each seconds cheaper.

For code that a test runs as a process of its own, but that says nothing of imports, kills or standard input.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support.paths import ROOT, TESTS

PRELOADED = ["torch.export", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto"]
if find_spec("triton") is None:  # with it, this import starts processes
    PRELOADED.append("torch._inductor.compile_fx")


class Running:
    """A process that runs."""

    def __init__(self, code: str, words: tuple[str, ...], env: dict[str, str], cwd: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.words = [code, *words]
        self.folder = tempfile.TemporaryDirectory(prefix="tandem-preloaded-")
        self.process = context.Process(target=_run, args=(self.words, env, cwd, self.folder.name))
        self.process.start()

    def result(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for its end, as `subprocess.run` does."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout)
        output = [Path(self.folder.name, name).read_text(encoding="utf-8") for name in ("1", "2")]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *output)


def run(
    code: str, *words: str, env: dict[str, str], cwd: Path = ROOT, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run code with arguments, as `python -c` would with this environment."""
    return Running(code, words, env, cwd).result(timeout)


def _run(words: list[str], env: dict[str, str], cwd: Path, folder: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None
    for number in (1, 2):
        os.dup2(os.open(Path(folder, str(number)), os.O_CREAT | os.O_WRONLY), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    installed = [path for path in sys.path if path not in ("", ".", str(ROOT), str(TESTS))]
    sys.path[:] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    sys.argv[:] = ["-c", *words[1:]]
    _start_server()
    try:
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _start_server() -> None:
    """Start this process's own server of workers as a fork: it has torch already, and no other thread runs yet."""
    with patch.object(util, "spawnv_passfds", _forked):
        forkserver.ensure_running()


def _forked(path: bytes, arguments: Sequence[Any], kept: Sequence[int]) -> int:
    """Run a command of multiprocessing's, `python ... -c CODE`, in a fork that has only the files `kept`."""
    if pid := os.fork():
        return pid
    try:
        open_files = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
        for file in open_files:
            if file > 2 and file not in kept:
                with contextlib.suppress(OSError):
                    os.close(file)
        exec(os.fsdecode(arguments[-1]), {})
    finally:
        os._exit(1)
