"""A seed as a scenario: a command, what disturbs it, and at which of its steps. And the run of one scenario."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from chaos import disks, server
from chaos.operations import (
    OPERATIONS,
    SERVED,
    VERSIONS,
    Operation,
    an_hour_later,
    check_built,
    check_registry,
    leftovers,
)
from chaos.world import NOTHING, Done, Plan, World
from pipeline.files.unfinished import TEMP, _host
from support import fault_proxy, tiny_build
from support import small_artifacts as small
from support.fault_proxy import Fault

BUG = 70
WAITED_S = 3.0
WORKER_STEPS = 60
RIVALS = {
    "publish": ("gc", "set", "pull"), "pull": ("gc", "set", "yank"), "set": ("gc", "publish"), "rollback": ("gc",),
    "yank": ("gc", "publish"), "gc": ("set", "publish"), "serve": ("gc", "set", "yank"), "build": ("gc",),
    "push": ("gc",),
}  # fmt: skip
"""Commands that run while another one is stopped: both succeed in any order."""


@dataclass(frozen=True)
class Scenario:
    """What a seed draws. `at` is a share of the command's steps."""

    seed: int
    operation: Operation
    disturbance: str
    at: float
    rival: str
    chance: random.Random = field(compare=False)

    def __str__(self) -> str:
        beside = f" beside {self.rival}" if self.disturbance == "stop" else ""
        return f"seed {self.seed}: {self.operation.name}, {self.disturbance}{beside} at {self.at:.3f}"


@dataclass
class Case:
    """A scenario that runs: its world, the step of the disturbance, the result of an undisturbed command."""

    scenario: Scenario
    world: World
    step: int
    expected: tuple[object, ...]
    """Results of an undisturbed command; with another one beside it, of both orders."""

    @property
    def operation(self) -> Operation:
        return self.scenario.operation

    def run(self, plan: Plan = NOTHING, meanwhile: Callable[[], None] = lambda: None) -> Done:
        """Run the command, then look at what a reader sees."""
        done = self.world.run(server.command(self.operation.command, self.world), plan, meanwhile)
        assert done.status != BUG, f"the command calls its error a bug:\n{done.said}"
        assert "Traceback" not in done.said or done.status in (130, -signal.SIGINT), done.said
        self.operation.check(self.world)
        return done


def of_seed(seed: int, only: str = "") -> Scenario:
    """Return the scenario of a seed; `only` limits operations and disturbances (`publish`, `full`, `publish:full`)."""
    chance = random.Random(seed)
    wanted = only.split(":") if only else []
    operations = [op for op in OPERATIONS.values() if not (set(wanted) & set(OPERATIONS)) or op.name in wanted]
    weights = [1 if op.needs_build else 3 for op in operations]
    operation = chance.choices(operations, weights)[0]
    kinds = [name for name in DISTURBANCES if fits(name, operation)]
    kinds = [name for name in kinds if not (set(wanted) & set(DISTURBANCES)) or name in wanted]
    return Scenario(
        seed, operation, chance.choice(kinds), chance.random(), chance.choice(RIVALS[operation.name]), chance
    )


def fits(disturbance: str, operation: Operation) -> bool:
    """Return whether a disturbance can meet an operation."""
    if disturbance.startswith("server-"):
        return operation.name != "build" and find_spec("obstore") is not None
    if disturbance == "worker":
        return operation.has_workers
    if disturbance == "damaged":
        return operation.name in ("pull", "serve", "build", "push")
    if disturbance == "damaged-registry":
        return not operation.needs_build
    return disks.may_mount() or disturbance not in ("full", "read-only")


def killed(case: Case) -> None:
    """SIGKILL, SIGTERM or Ctrl-C at a step."""
    case.run(Plan(case.scenario.disturbance, case.step))


def failing(case: Case) -> None:
    """A disk that fails once, at a step, with an error."""
    case.run(Plan(case.scenario.disturbance, case.step))


def slow(case: Case) -> None:
    """A disk that is slow from a step on: the command ends well."""
    done = case.run(Plan("slow", case.step))
    assert done.status == 0, done.said


def clock(case: Case) -> None:
    """The clock of the host jumps by more than a year: the command ends well."""
    done = case.run(Plan(case.scenario.disturbance, case.step))
    assert done.status == 0, done.said


def paused(case: Case) -> None:
    """SIGSTOP at a step, meanwhile another command, which may wait for the lease of the stopped one, then SIGCONT."""
    rival = OPERATIONS[case.scenario.rival]
    started: list[subprocess.Popen[str]] = []

    def meanwhile() -> None:
        started.append(_beside(case.world).start(rival.command))
        with contextlib.suppress(subprocess.TimeoutExpired):
            started[0].wait(WAITED_S)

    case.run(Plan("stop", case.step), meanwhile)
    if not started:  # the command ended before the step
        meanwhile()
    said = started[0].communicate(timeout=200)[0]
    case.world.wait_for_end(started[0].pid)
    assert started[0].returncode == 0, f"{rival.name}: {said}"
    case.operation.check(case.world)


def _beside(world: World) -> World:
    """The same world with a folder of its own for the control of a second command."""
    return World(world.root, world.control.with_name("control-2"), world.environ)


def twice(case: Case) -> None:
    """Two of the same command at the same time; half of the builds write to another folder, from one cache."""
    command = case.operation.command
    if case.operation.has_workers and case.scenario.chance.random() < 0.5:
        command = tuple("out-2" if word == "out" else word for word in command)
    first = case.world.start(case.operation.command, Plan("slow", case.step))
    second = _beside(case.world).run(command)
    said = first.communicate(timeout=200)[0]
    case.world.wait_for_end(first.pid)
    assert BUG not in (first.returncode, second.status), said + second.said
    assert 0 in (first.returncode, second.status), said + second.said
    if "out-2" in command:
        assert first.returncode == second.status == 0, said + second.said
        assert tiny_build.same_parts(case.world.path("out-2")) in case.expected
        shutil.rmtree(case.world.path("out-2"))
    case.operation.check(case.world)


def worker(case: Case) -> None:
    """A worker is killed, as for lack of memory."""
    case.run(Plan("kill", 1 + int(WORKER_STEPS * case.scenario.at), "worker"))


def full(case: Case) -> None:
    """A file system that is full from a step on."""
    filler = case.world.path("filler")

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))

    with disks.mounted(case.world):
        case.run(Plan("stop", case.step), fill)
        filler.unlink(missing_ok=True)
        recover(case)


def read_only(case: Case) -> None:
    """A file system that becomes read-only at a step."""
    with disks.mounted(case.world):
        try:
            plan, command = Plan("stop", case.step), case.operation.command
            done = case.world.run(command, plan, lambda: disks.remount(case.world, "ro"))
        finally:
            disks.remount(case.world, "rw")
        assert done.status != BUG, done.said
        case.operation.check(case.world)
        recover(case)


def damaged(case: Case) -> None:
    """A file of the local cache is truncated or has a flipped bit: the command does its work again."""
    path = _damage(case, [case.world.path("cache")])
    done = case.run()
    assert done.status == 0, f"{path}: {done.said}"


def damaged_registry(case: Case) -> None:
    """A file of the registry is truncated or has a flipped bit: no reader gets wrong bytes, whatever the command."""
    registry = case.world.registry
    copy = registry.with_name("registry-copy")
    shutil.copytree(registry, copy)
    path = _damage(case, [registry])
    done = case.world.run(case.operation.command)
    assert done.status != BUG, f"{path}: {done.said}"
    assert "Traceback" not in done.said, done.said
    assert _all_known(case.world), f"{path}: wrong bytes were pulled"
    shutil.rmtree(registry)
    copy.rename(registry)


def _all_known(world: World) -> bool:
    """Return whether each pulled artifact is a whole release."""
    pulled = [path for path in (world.path("pulled"), world.path(*SERVED)) if path.exists()]
    releases = [small.digests(world.path("artifacts", version)) for version in VERSIONS]
    return all(small.digests(path) in releases for path in pulled)


def _damage(case: Case, folders: list[Path]) -> str:
    """Flip a bit of a file, or cut it; returns its name."""
    chance = case.scenario.chance
    files = sorted(
        p
        for folder in folders
        for p in folder.rglob("*")
        if p.is_file() and p.stat().st_size and not p.name.endswith(".lock")
    )
    path = chance.choice(files)
    data = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        data = data[: chance.randrange(len(data))]
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.unlink()  # the pulled artifact has links of the cache's files
    path.write_bytes(data)
    return str(path.relative_to(case.world.root))


def stale(case: Case) -> None:
    """Locks, temporary files, leases and parts of files that processes and hosts left which are gone."""
    root, chance = case.world.root, case.scenario.chance
    dead = subprocess.Popen(["true"])
    dead.wait()
    folders = [
        path
        for path in (root, *root.rglob("*"))
        if path.is_dir() and ".lock" not in path.name and "artifacts" not in path.parts
    ]
    for folder in chance.sample(folders, min(12, len(folders))):
        mine = folder / f"{TEMP}{_host()}-{dead.pid}-00000000-x"
        other = folder / f"{TEMP}ffffff-7-00000000-y"
        for path in (mine, other):
            path.write_bytes(b"x") if chance.random() < 0.5 else path.mkdir()
            os.utime(path, (1, 1))
    for name in ("leases/0123-4", "collections/mark", "collections/5678"):
        path = case.world.registry / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"old\n")
        os.utime(path, (time.time() - 90_000,) * 2)
    for path in (root / "cache/blobs/locks").glob("*.lock"):
        path.write_bytes(b"7")
    done = case.run()
    assert done.status == 0, done.said
    for path in root.rglob(f"{TEMP}*-00000000-*"):  # of folders to which the command does not write
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def server_fails(case: Case) -> None:
    """A few requests fail, one way or another, or their answers are slow: the command ends well."""
    kind = case.scenario.chance.choice(("500", "503", "reset", "lost", "cut", "slow"))
    with on_server(case, Fault(".", kind, times=2, skip=case.step - 1, seconds=2.0)) as proxy:
        done = case.run()
        assert done.status == 0, f"{proxy.met}: {done.said}"
        assert proxy.met, "no request met the fault"
        proxy.faults = []
        recover(case)


def server_away(case: Case) -> None:
    """The server is away from a request on, for longer than a command waits; then it is there again."""
    with on_server(case, Fault(".", "reset", times=1 << 30, skip=case.step - 1)) as proxy:
        case.run()
        assert proxy.met, "no request met the fault"
        proxy.faults = []
        recover(case)


def server_lies(case: Case) -> None:
    """An answer has a flipped bit, is cut, or is 404: no reader gets wrong bytes, and no release is lost."""
    chance, registry = case.scenario.chance, case.world.registry
    kind, copy = chance.choice(("wrong", "short", "404")), registry.with_name("registry-copy")
    shutil.copytree(registry, copy)
    with on_server(case, Fault("^GET", kind, skip=chance.randrange(case.step), at=chance.random())) as proxy:
        done = case.world.run(server.command(case.operation.command, case.world))
        assert done.status != BUG, f"{proxy.met}: {done.said}"
        assert "Traceback" not in done.said, done.said
        assert _all_known(case.world), f"{proxy.met}: wrong bytes were pulled"
        check_registry(case.world)
        if case.operation.needs_build:
            check_built(case.world)
        proxy.faults = []
        shutil.rmtree(registry)  # moves of an alias have no digest: its history may be wrong
        copy.rename(registry)
        recover(case)


@contextlib.contextmanager
def on_server(case: Case, fault: Fault) -> Iterator[fault_proxy.Proxy]:
    """Let the registry and the shared cache of a world be on a server with a fault."""
    with server.running(case.world.root) as proxy:
        proxy.faults = [fault]
        case.world.environ.update(server.environ(proxy.endpoint))
        yield proxy


DISTURBANCES: dict[str, Callable[[Case], None]] = {
    "kill": killed, "term": killed, "interrupt": killed, "stop": paused, "enospc": failing, "eio": failing,
    "erofs": failing, "slow": slow, "future": clock, "past": clock, "twice": twice, "worker": worker, "full": full,
    "read-only": read_only, "damaged": damaged, "damaged-registry": damaged_registry, "stale": stale,
    "server-fails": server_fails, "server-away": server_away, "server-lies": server_lies,
}  # fmt: skip


RECOVERED = ("full", "read-only", "server-fails", "server-away", "server-lies")
"""Disturbances that recover themselves, before their disk or server is gone."""


def recover(case: Case) -> None:
    """Run the command again an hour later: it ends well, with the result of an undisturbed one, and nothing is left."""
    an_hour_later(case.world)
    done = case.run()
    assert done.status == 0, f"the next run fails:\n{done.said}"
    found = case.operation.result(case.world)
    assert found in case.expected, f"another result than undisturbed: {found} instead of {case.expected}"
    after = case.world.run(server.command(("gc", "registry"), case.world))
    assert after.status == 0, after.said
    check_registry(case.world)
    assert not (left := leftovers(case.world)), f"left behind: {left}"


def play(case: Case) -> None:
    """Disturb the command, and recover.

    Raises:
        AssertionError: an invariant does not hold.

    """
    DISTURBANCES[case.scenario.disturbance](case)
    if case.scenario.disturbance not in RECOVERED:
        recover(case)
