"""Compile workers: errors, Ctrl-C and parents that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pipeline.errors import HostError
from pipeline.executors.base import Executor
from pipeline.executors.local import LocalExecutor
from support.paths import PYTHONPATH, ROOT
from support.processes import heed_interrupts, members, wait_for

SLEEPERS = """
import time
from pipeline.executors.local import LocalExecutor
if __name__ == "__main__":
    print("started", flush=True)
    LocalExecutor(2).run(time.sleep, [600, 600], print)
"""


SHARING = """
import sys
from pipeline.executors.local import LocalExecutor
def torch_at_start(_):
    imported = "torch" in sys.modules
    import torch
    return imported, torch.get_num_threads()
if __name__ == "__main__":
    print(LocalExecutor(2, ("torch",)).run(torch_at_start, range(4), lambda _: None))
"""


def square(number: int) -> int:
    return number * number


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> int:
    raise HostError(f"job {number} failed")


def test_run_keeps_the_order_of_jobs():
    seen: list[int] = []
    executor: Executor = LocalExecutor(2)
    assert executor.run(square, [3, 1, 2], seen.append) == [9, 1, 4]
    assert sorted(seen) == [1, 4, 9]


def test_run_error_of_a_job_is_raised_as_it_is():
    with pytest.raises(HostError, match="job 1 failed"):
        LocalExecutor(1).run(fail, [1, 1], lambda _: None)


def test_run_dead_worker_is_explained():
    with pytest.raises(HostError, match="probably for lack of memory"):
        LocalExecutor(1).run(die, [1], lambda _: None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)])
def test_workers_end_with_their_parent(tmp_path, number, code):
    """Only the parent is told; idle or busy workers of a killed build once stayed for ever."""
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        env=env, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    wait_for(lambda: len(members(child.pid)) >= 3)  # the parent, and two workers at least
    os.kill(child.pid, number)
    assert child.wait(timeout=30) in (code, -number)
    wait_for(lambda: not members(child.pid))


def name_of_home(_: int) -> str:
    return os.environ["HOME"]


def test_workers_have_the_environment_of_now(monkeypatch):
    """The server that workers are forked from has the environment of the moment when it started."""
    for home in ("/first", "/second"):
        monkeypatch.setenv("HOME", home)
        assert LocalExecutor(1).run(name_of_home, [0], lambda _: None) == [home]


def test_workers_share_one_import_and_split_the_cores(tmp_path):
    """Each worker once imported torch and its compiler for itself."""
    script = tmp_path / "workers.py"
    script.write_text(SHARING)
    command, env = [sys.executable, str(script)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{[(True, max(1, len(os.sched_getaffinity(0)) // 2))] * 4}\n"


LONG_TMPDIR = """
from pipeline.executors.local import LocalExecutor
print(LocalExecutor(1).run(abs, [-3], lambda result: None))
"""


def test_run_with_a_long_tmpdir(tmp_path):
    """`OSError: AF_UNIX path too long`: the server of the workers has a socket there."""
    folder = tmp_path / ("x" * 99)
    folder.mkdir()
    env = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", LONG_TMPDIR], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "[3]\n", done.stderr
