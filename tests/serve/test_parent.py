"""An engine's process does not outlive the server's first process."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import time

from pipeline.serve.parent import end_with_parent

SPAWN = multiprocessing.get_context("spawn")


def _engine(pids) -> None:
    end_with_parent()
    pids.put(os.getpid())
    time.sleep(60)


def _server(pids) -> None:
    engine = SPAWN.Process(target=_engine, args=(pids,))
    engine.start()
    engine.join()


def test_engine_ends_when_the_server_is_killed():
    """vLLM's engine waited for requests for ever, with the memory of the model."""
    pids = SPAWN.Queue()
    server = SPAWN.Process(target=_server, args=(pids,))
    server.start()
    engine = pids.get(timeout=60)
    os.kill(server.pid, signal.SIGKILL)
    server.join()
    ends = time.monotonic() + 20
    while pathlib.Path(f"/proc/{engine}").exists() and _state(engine) != "Z":
        assert time.monotonic() < ends, "the engine outlived the server"
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        with pathlib.Path(f"/proc/{pid}/stat").open(encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_process_without_a_parent_process_goes_on():
    end_with_parent()
