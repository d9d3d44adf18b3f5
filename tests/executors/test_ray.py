"""Jobs on a real Ray cluster of three nodes: order, output, errors, lost workers and nodes, slow nodes, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import HostError, Problem, RecipeError
from pipeline.executors.base import Task
from support import ray_cluster
from support.paths import ROOT
from support.processes import heed_interrupts, wait_for

pytestmark = pytest.mark.ray


def test_no_cluster_is_an_error():
    """The first test: the others share a connection of this process."""
    from pipeline.executors.ray import connected

    with pytest.raises(HostError, match="no usable cluster"), connected("127.0.0.1:1"):
        pass


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[ray_cluster.Nodes]:
    import ray

    from pipeline.executors.ray import connected

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    with ray_cluster.running(tmp_path_factory.mktemp("nodes")) as started, connected(started.address):
        yield started


def run(nodes, work, jobs, log=lambda _: None, done=lambda _: None, **settings):
    """Run jobs (name, argument) on the cluster."""
    from pipeline.executors.ray import RayExecutor

    def describe(job):
        log_file = nodes.folder / "logs" / f"{job[0]}.log"
        return Task(job[0], log_file, **settings)

    return RayExecutor(describe, log).run(work, jobs, done)


def jobs_of(values) -> list[tuple[str, object]]:
    return [(f"job-{index}", value) for index, value in enumerate(values)]


def square(job) -> int:
    sys.stdout.write(f"squares {job[1]}\n")
    sys.stdout.flush()
    os.system(f"echo native {job[1]}")
    return job[1] ** 2


def test_results_are_in_order_and_output_arrives(nodes):
    """Output of native code too; a log file of this machine has it all when a job has ended."""
    seen, lines = [], []
    assert run(nodes, square, jobs_of([3, 1, 2]), lines.append, seen.append) == [9, 1, 4]
    assert sorted(seen) == [1, 4, 9]
    assert (nodes.folder / "logs/job-0.log").read_text() == "squares 3\nnative 3\n"
    assert sum("started on" in line for line in lines) == 3


def busy(folder: Path, job) -> int:
    """Return how many jobs run at the same time, with output in between."""
    mark = folder / job[0]
    mark.touch()
    most = 0
    for _ in range(15):
        sys.stdout.write("working\n")
        sys.stdout.flush()
        time.sleep(0.2)
        most = max(most, len(list(folder.iterdir())))
    mark.unlink()
    return most


def test_jobs_have_a_core_each(nodes, tmp_path):
    """A task that waited for the actor's answers gave its core to a fourth task meanwhile."""
    assert max(run(nodes, partial(busy, tmp_path), jobs_of(range(6)))) <= 3


def fail(job) -> None:
    sys.stdout.write("before the failure\n")
    raise RecipeError([Problem("tiny.yaml:1", "first"), Problem("tiny.yaml:2", "second")])


def test_error_of_a_job_is_raised_as_it_is(nodes):
    with pytest.raises(RecipeError) as raised:
        run(nodes, fail, [("failing", 0)])
    assert [problem.where for problem in raised.value.problems] == ["tiny.yaml:1", "tiny.yaml:2"]
    assert "before the failure" in (nodes.folder / "logs/failing.log").read_text()


def test_error_of_other_work_of_the_driver_ends_the_jobs(nodes, tmp_path):
    """A build whose shards could not be written waited for all graphs."""
    from pipeline.executors.ray import RayExecutor

    def watch() -> None:
        if len(list(tmp_path.iterdir())) == 2:
            raise HostError("no space", where="shards")

    describe = lambda job: Task(job[0], nodes.folder / "logs" / f"{job[0]}.log")  # noqa: E731
    started = time.monotonic()
    with pytest.raises(HostError, match="no space"):
        RayExecutor(describe, watch=watch).run(partial(sleep_after_mark, tmp_path), jobs_of(range(2)), lambda _: None)
    assert time.monotonic() - started < 100


def sleep_after_mark(folder: Path, job) -> None:
    (folder / job[0]).touch()
    time.sleep(200)


def crash(job) -> None:
    raise ZeroDivisionError("a bug")


def test_bug_in_a_job_is_raised_with_its_traceback_in_the_log(nodes):
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(nodes, crash, [("crashing", 0)])
    assert "ZeroDivisionError: a bug" in (nodes.folder / "logs/crashing.log").read_text()


def die_once(folder: Path, job) -> str:
    import ray

    node = ray.get_runtime_context().get_node_id()
    mark = folder / job[0]
    if not mark.exists():
        mark.write_text(node)
        time.sleep(3)  # until the driver has read where the job runs
        os.kill(os.getpid(), signal.SIGKILL)
    return node


def test_killed_worker_runs_elsewhere(nodes, tmp_path):
    lines = []
    (node,) = run(nodes, partial(die_once, tmp_path), [("killed", 0)], lines.append)
    assert node != (tmp_path / "killed").read_text()
    assert any("its worker or node died; run again" in line for line in lines)


def die(job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_job_that_kills_every_worker_is_an_error(nodes):
    with pytest.raises(HostError, match=r"lost on .*, 3 times"):
        run(nodes, die, [("deadly", 0)])


def test_missing_resource_is_a_warning(nodes, tmp_path):
    """A cluster that scales itself may start a node that has it."""
    lines = []

    def log(line: str) -> None:
        lines.append(line)
        if "warning" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(nodes, square, jobs_of([1]), log, custom={"neuronx-cc": 1.0})
    assert lines == ["warning: no node that is up has neuronx-cc: 1; job-0 waits for such a node"]


def slow_once(folder: Path, job) -> str:
    import ray

    if job[1] == "slow" and not (folder / "slow").exists():
        (folder / "slow").touch()
        time.sleep(600)
    return ray.get_runtime_context().get_node_id()


def test_slow_job_gets_a_second_run(nodes, tmp_path, monkeypatch):
    from pipeline.executors import scheduling

    monkeypatch.setattr(scheduling, "SLOW_S", 3.0)
    lines = []
    run(nodes, partial(slow_once, tmp_path), jobs_of(["slow", "fast"]), lines.append, seconds=0.5)
    assert any("job-0: slow on" in line for line in lines)


def stay_on(victim: str, mark: Path, job) -> str:
    """Return the node when the victim has a job too, but never end on the victim."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    while node == victim or not mark.exists():
        if node == victim:
            mark.touch()
        time.sleep(1)
    return node


def test_killed_node_is_replaced_by_another(nodes, tmp_path):
    """The node's own processes are killed, as if the machine were lost; its job runs elsewhere."""
    victim, mark, lines = nodes.add(), tmp_path / "mark", []

    def kill_node() -> None:
        wait_for(mark.exists, 120)
        nodes.cluster.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill_node)
    killer.start()
    ended = run(nodes, partial(stay_on, victim.node_id, mark), jobs_of(range(8)), lines.append)
    killer.join()
    assert (len(ended), victim.node_id in ended) == (8, False)
    assert any("run again" in line for line in lines)


SLEEPERS = """
import sys, subprocess
from pathlib import Path
from pipeline.executors.base import Task
from pipeline.executors.ray import RayExecutor, connected
with connected(sys.argv[1]):
    describe = lambda job: Task(str(job), Path(sys.argv[2]) / "log")
    executor = RayExecutor(describe, lambda line: print(line, flush=True))
    executor.run(subprocess.call, [["sleep", sys.argv[3]]] * 3, print)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_tasks_end_with_the_driver(nodes, tmp_path, number):
    seconds = f"{6000 + number}.5"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS, nodes.address, str(tmp_path), seconds], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=env, cwd=tmp_path, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert driver.stdout is not None
    driver.stdout.readline()
    wait_for(lambda: sleepers(seconds), 60)
    os.kill(driver.pid, number)
    driver.wait(timeout=60)
    wait_for(lambda: not sleepers(seconds), 60)


def sleepers(seconds: str) -> list[str]:
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if seconds.encode() in command(path)]


def command(path: Path) -> bytes:
    try:
        words = path.read_bytes().split(b"\0")
    except OSError:
        return b""
    return words[1] if words[0] == b"sleep" else b""


CLIENT = """
import operator, sys
from pathlib import Path
from pipeline.executors.base import Task
from pipeline.executors.ray import RayExecutor, connected
with connected(sys.argv[1]):
    executor = RayExecutor(lambda job: Task(str(job), Path(sys.argv[2]) / "log"))
    print(executor.cores, executor.run(operator.neg, [3, 4], lambda result: None))
"""


def test_client_outside_of_the_cluster(nodes, tmp_path):
    """`ray://HOST:PORT`: a machine that is not a part of the cluster."""
    command = [sys.executable, "-c", CLIENT, nodes.client_address, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "3 [-3, -4]\n", done.stderr
