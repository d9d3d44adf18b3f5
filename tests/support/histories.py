"""Histories of a registry by seeds: its real code over a real bucket, with scheduler, clock and faults of this file.

Each request to the bucket is a point where another process may run. Processes are threads of which one runs at a time,
so that a seed is a history. Time is virtual: hosts pause for minutes, and leases end, in no time. Requests and answers
are lost, requests are repeated, processes are killed. Every effect is recorded at the moment when it happens.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from pipeline.errors import TandemError
from pipeline.registry import aliases
from pipeline.stores import base, leases, objects
from pipeline.stores.base import SMALL_BYTES, Bucket, Interrupted, Listing, Object
from pipeline.stores.objects import ObjectStore

SCHEME = "history"
RATES = (0.0, 0.003, 0.02, 0.08)
"""Chances of a fault at each request; a history takes one of them for each kind, so that kinds meet in many ways."""
PAUSES_S = (30.0, 400.0, 1000.0, 4000.0)
"""Around the limits of leases: renewal, validity, a dead lease, a dead collection."""


class Killed(BaseException):
    """The end of a process: no code of it has another effect."""


@dataclass
class Process:
    """A host with a clock that differs from the store's by `skew_s`."""

    name: str
    skew_s: float = 0.0
    dead: bool = False


@dataclass
class Actor:
    """A thread of a process; runs while it holds `turn`, and only after `wake` or once `awaited` holds."""

    process: Process
    thread: threading.Thread | None = None
    wake: float = 0.0
    awaited: Callable[[], bool] | None = None
    done: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def runs(self, now: float) -> bool:
        """Return whether it could run now; an actor of a dead process does, to end."""
        return not self.done and (
            self.process.dead or now >= self.wake or (self.awaited is not None and self.awaited())
        )


@dataclass(frozen=True)
class Effect:
    """A change of the bucket at a virtual time, by a process."""

    when: float
    process: str
    kind: str
    key: str
    data: bytes = b""


@dataclass
class Command:
    """A command that a process ran: when, and what it returned or raised; `error` stays None while it runs."""

    process: str
    text: str
    begun: float
    ended: float = float("inf")
    result: Any = None
    error: BaseException | None = None


class History:
    """One history of processes, each a list of commands that it runs one after another."""

    def __init__(self, seed: int, inner: Bucket, *, faults: bool = True) -> None:
        self.random, self.inner, self.faults = random.Random(seed), inner, faults
        self.lost, self.repeated, self.killed, self.paused = (self.random.choice(RATES) for _ in range(4))
        self.now, self.actors, self.current = 1e6, list[Actor](), threading.local()
        self.effects, self.commands, self.modified = list[Effect](), list[Command](), dict[str, float]()
        self.finished = threading.Event()
        self.watch: Callable[[Effect], None] = lambda effect: None
        self.failure: BaseException | None = None

    def run(self, processes: list[list[tuple[str, Callable[[], Any]]]]) -> None:
        """Run processes until all have ended."""
        for n, commands in enumerate(processes):
            process = Process(f"p{n}", self.random.choice((0.0, -3e5, 7e4)))
            self.add(process, lambda process=process, commands=commands: self._commands(process, commands))
        self.finished.clear()
        self._next().turn.release()
        self.finished.wait()
        if self.failure is not None:
            raise self.failure

    def _commands(self, process: Process, commands: list[tuple[str, Callable[[], Any]]]) -> None:
        for text, call in commands:
            self.point()
            command = Command(process.name, text, self.now)
            self.commands.append(command)
            try:
                command.result = call()
            except (TandemError, Killed) as error:
                command.error = error
            command.ended = self.now
            if process.dead:
                return

    def add(self, process: Process, work: Callable[[], None]) -> Actor:
        """Add an actor, which runs when its turn comes."""
        actor = Actor(process)

        def run() -> None:
            actor.turn.acquire()
            self.current.actor = actor
            try:
                work()
            except Killed:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            actor.done = True
            self._pass_on()

        actor.thread = threading.Thread(target=run, daemon=True)
        self.actors.append(actor)
        actor.thread.start()
        return actor

    def _next(self) -> Actor:
        """Return an actor that can run, after the time that this takes."""
        alive = [actor for actor in self.actors if not actor.done]
        able = [actor for actor in alive if actor.runs(self.now)]
        if not able:
            self.now = min(actor.wake for actor in alive)
            able = [actor for actor in alive if actor.runs(self.now)]
        return self.random.choice(able)

    def _pass_on(self) -> None:
        if all(actor.done for actor in self.actors):
            self.finished.set()
        else:
            self._next().turn.release()

    def point(self, sleep_s: float = 0.0, awaited: Callable[[], bool] | None = None) -> None:
        """Let others run, until `sleep_s` has passed or `awaited` holds.

        Raises:
            Killed: this process has ended.

        """
        actor: Actor = self.current.actor
        self.now += self.random.random() * 0.2
        actor.wake, actor.awaited = self.now + sleep_s, awaited
        if self.faults and not actor.process.dead:
            actor.process.dead = self.random.random() < self.killed / 4
            if self.random.random() < self.paused:
                self._pause(actor.process, self.random.choice(PAUSES_S))
        following = self._next()
        if following is not actor:
            following.turn.release()
            actor.turn.acquire()
        if actor.process.dead:
            raise Killed

    def _pause(self, process: Process, pause_s: float) -> None:
        for actor in self.actors:
            if actor.process is process:
                actor.wake, actor.awaited = max(actor.wake, self.now + pause_s), None

    def effect(self, kind: str, key: str, data: bytes = b"") -> None:
        """Record a change of the bucket."""
        effect = Effect(self.now, self.current.actor.process.name, kind, key, data)
        self.effects.append(effect)
        if kind != "delete":
            self.modified[key] = self.now
        self.watch(effect)

    def clock(self) -> float:
        """Return the seconds of the clock of the host that asks."""
        return self.now + self.current.actor.process.skew_s


class HistoryBucket:
    """See `Bucket`: each request is a point of the history, and may fail as requests over a network do."""

    def __init__(self, history: History) -> None:
        self.history, self.inner, self.where = history, history.inner, f"{SCHEME}://"

    def request(self, call: Callable[[], Any], record: Callable[[Any], None] = lambda _: None) -> Any:
        """Send a request, twice if its client repeats it; returns the last answer.

        Raises:
            Interrupted: the request or its answer is lost. Killed: the process has ended.

        """
        history = self.history
        history.point()
        luck = history.random.random() if history.faults else 1.0
        if luck < history.lost / 2:
            raise Interrupted("request lost", where=self.where, fix="try again")
        record(answer := call())
        if luck < history.lost:
            raise Interrupted("answer lost", where=self.where, fix="try again")
        if luck < history.lost + history.repeated:
            history.point()
            record(answer := call())
        history.point()
        return answer

    def written(self, kind: str, key: str, data: bytes) -> Callable[[Any], None]:
        """Return what records a write, if it was carried out."""
        return lambda done: self.history.effect(kind, key, data) if done else None

    def check(self) -> None:
        """A server that honours conditions."""

    def size(self, key: str) -> int | None:
        return self.request(lambda: self.inner.size(key))

    def upload(self, key: str, source: Path, sha256: str, parts: int) -> None:
        self.request(lambda: self.inner.upload(key, source, sha256, parts), lambda _: self.history.effect("put", key))

    def read(self, key: str, offset: int, buffer: memoryview, token: str | None = None) -> int:
        return self.request(lambda: self.inner.read(key, offset, buffer, token))

    def get(self, key: str, limit: int = SMALL_BYTES) -> Object | None:
        return self.request(lambda: self.inner.get(key, limit))

    def create(self, key: str, data: bytes) -> bool:
        return self.request(lambda: self.inner.create(key, data), self.written("put", key, data))

    def swap(self, key: str, data: bytes, token: str | None) -> bool:
        return self.request(lambda: self.inner.swap(key, data, token), self.written("swap", key, data))

    def list(self, prefix: str) -> Iterator[Listing]:
        entries = self.request(lambda: sorted(self.inner.list(prefix), key=lambda entry: entry.key))
        for entry in entries:
            yield Listing(entry.key, entry.size, self.history.modified[entry.key], entry.token)

    def delete(self, key: str) -> None:
        self.request(lambda: self.inner.delete(key), lambda _: self.history.effect("delete", key))


class _Event:
    """`threading.Event` in virtual time."""

    def __init__(self, history: History) -> None:
        self.history, self.is_set = history, False

    def set(self) -> None:
        self.is_set = True

    def wait(self, timeout: float) -> bool:
        self.history.point(timeout, lambda: self.is_set)
        return self.is_set


class _Thread:
    """`threading.Thread` as an actor of the process that starts it."""

    def __init__(self, history: History, target: Callable[[], None]) -> None:
        self.history, self.target = history, target

    def start(self) -> None:
        self.actor = self.history.add(self.history.current.actor.process, self.target)

    def join(self) -> None:
        while not self.actor.done:
            self.history.point(1e9, lambda: self.actor.done)


class _Inline:
    """`ThreadPoolExecutor` that works at once: requests of one process in a fixed order."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        return map(work, items)


def _one_by_one(threads: int, work: Callable[[Any], Any], items: list[Any]) -> None:
    for item in items:
        work(item)


def opened(history: History, monkeypatch: Any) -> str:
    """Give the registry's code the bucket, the clock and the threads of a history; return the registry's URL."""
    monkeypatch.setitem(base.STORES, SCHEME, "support.histories:open_history")
    monkeypatch.setattr(objects, "ThreadPoolExecutor", _Inline)
    monkeypatch.setattr(objects, "in_parallel", _one_by_one)
    threads = SimpleNamespace(
        Thread=lambda target, **_: _Thread(history, target), Event=lambda: _Event(history),
    )  # fmt: skip
    clock = SimpleNamespace(
        monotonic=history.clock, sleep=history.point,
        clock_gettime=lambda _: history.clock(), CLOCK_BOOTTIME=0,
    )  # fmt: skip
    ids = itertools.count()
    monkeypatch.setattr(leases, "threading", threads)
    monkeypatch.setattr(leases, "time", clock)
    days = SimpleNamespace(gmtime=lambda: time.gmtime(history.clock()), strftime=time.strftime)
    monkeypatch.setattr(aliases, "time", days)
    monkeypatch.setattr(leases, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"{next(ids):032x}")))
    _opened.clear()
    _opened.append(history)
    return f"{SCHEME}://registry"


_opened: list[History] = []
"""The history that `open_history` opens."""


def open_history(_: str) -> ObjectStore:
    """Return the registry of the present history."""
    return ObjectStore(HistoryBucket(_opened[0]))
