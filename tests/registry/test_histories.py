"""Concurrent publish, alias, rollback and gc with lost answers, pauses, kills and wrong clocks, against a model."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.registry.aliases import roll_back, set_alias
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.releases import collect
from pipeline.stores.base import open_bucket
from pipeline.stores.folder import FolderBucket
from support import small_artifacts as small
from support.histories import Command, Effect, History, Killed, opened

DIGEST = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')
UNSURE = (HostError, Killed)
"""Errors after which the change may have been made; after any other, it was not."""


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three artifacts that share blobs."""
    folder = tmp_path_factory.mktemp("histories")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")  # the same digests, and so the same histories, each time
        return make_roots(folder)


def make_roots(folder: Path) -> list[Path]:
    """Make three artifacts that share blobs."""
    return [
        small.make_validated(folder / f"{n}", folder / "work", graph=graph, weights=weights, size=100).root
        for n, (graph, weights) in enumerate([(b"a", b"x"), (b"b", b"x"), (b"b", b"y")])
    ]


class Model:
    """What a registry may do: releases never change and are whole, an alias is a register of moves."""

    def __init__(self, history: History) -> None:
        self.history, self.releases, self.blobs = history, dict[str, set[str]](), set[str]()
        self.moves: list[Effect] = []
        history.watch = self.check

    def check(self, effect: Effect) -> None:
        """Compare a change of the bucket with what may happen."""
        digest = effect.key.rpartition("/")[2]
        if effect.key.startswith("blobs/"):
            (self.blobs.discard if effect.kind == "delete" else self.blobs.add)(digest)
        elif effect.key.startswith("releases/"):
            assert effect.kind == "put"
            assert effect.key not in self.releases, f"{effect.key} was replaced"
            self.releases[effect.key] = _digests(effect.data, self.history.inner)
        elif effect.key.startswith("aliases/"):
            assert effect.kind == "swap"
            before = self.moves[-1].data if self.moves else b""
            assert effect.data.split(b"\n", 1)[1] == before, "a move was lost"
            self.moves.append(effect)

    def torn(self) -> set[str]:
        """Return the releases that lack a blob."""
        return {key for key, digests in self.releases.items() if not digests <= self.blobs}

    def moves_of(self, command: Command) -> list[Effect]:
        """Return the moves that a command made."""
        return [m for m in self.moves if m.process == command.process and command.begun <= m.when <= command.ended]

    def versions_during(self, command: Command) -> set[str]:
        """Return the versions that the alias had at some time while a command ran."""
        times = [(move.when, _version(move)) for move in self.moves]
        before = [version for when, version in times if when <= command.begun][-1:]
        return {*before, *(version for when, version in times if command.begun <= when <= command.ended)}


def _version(move: Effect) -> str:
    return move.data.split(b"\n")[0].split(b"\t")[0].decode()


def _digests(document: bytes, inner: Any) -> set[str]:
    """Return the digests of all blobs of a release; the manifests that an index lists are blobs themselves."""
    digests = {digest.decode() for digest in DIGEST.findall(document)}
    if b'"variants"' not in document:
        return digests
    listed = [inner.get(f"blobs/sha256/{digest[:2]}/{digest}") for digest in sorted(digests)]
    return digests.union(*(_digests(manifest.data, inner) for manifest in listed if manifest is not None))


def play(seed: int, inner: Any, roots: list[Path], monkeypatch: pytest.MonkeyPatch) -> Model:
    """Play a history to its end, then once more without faults, and check all of it."""
    history = History(seed, inner)
    model, url = Model(history), opened(history, monkeypatch)
    history.faults = False
    history.run([begin(url, roots)])
    history.faults = True
    history.run([[command(history, url, roots) for _ in range(3)] for _ in range(history.random.choice((2, 3, 4)))])
    for done in history.commands:
        check_command(model, done)
    recover(history, model, url, roots)
    return model


def begin(url: str, roots: list[Path]) -> list[tuple[str, Callable[[], Any]]]:
    """Return commands that publish two releases, the alias at the second."""
    return [
        (f"publish {n}", lambda n=n: publish(roots[n], url, ["prod"], PublishSettings(version=str(n + 1))))
        for n in range(2)
    ]


def command(history: History, url: str, roots: list[Path]) -> tuple[str, Callable[[], Any]]:
    """Return a command by chance, as text and function."""
    choice, root = history.random.randrange(10), history.random.choice(roots)
    version = history.random.choice(["1", "2", "3", None])
    if choice < 4:
        aliases = ["prod"] if history.random.random() < 0.5 else []
        return "publish", lambda: publish(root, url, aliases, PublishSettings(version=version))
    if choice < 6:
        return f"set {version or 1}", lambda: set_alias(url, f"small@{version or 1}", "prod")
    if choice < 8:
        leave = version if history.random.random() < 0.5 else None
        return f"rollback {leave or ''}", lambda: roll_back(url, "small", "prod", leave)
    return "gc", lambda: collect(url)


def check_command(model: Model, command: Command) -> None:
    """Compare the answer of a command with the moves that it made and the versions that it could see."""
    moves = [_version(move) for move in model.moves_of(command)]
    assert len(moves) <= 1, f"{command} moved {moves}"
    if isinstance(command.error, UNSURE):
        return
    if command.error is not None:
        assert isinstance(command.error, InputError | ArtifactError)
        assert not moves, f"{command} was refused after it moved the alias"
    elif command.text.startswith("rollback"):
        before, after = command.result
        assert moves in ([after], []), command
        assert {before, after} <= model.versions_during(command) | {m.split("\t")[0] for m in _past(model, command)}
    elif command.text.startswith("set"):
        assert command.result in model.versions_during(command)
        assert moves in ([command.result], [])
    elif command.text == "publish" and command.result.aliases:
        assert command.result.version in model.versions_during(command)


def _past(model: Model, command: Command) -> list[str]:
    """Return the lines of the alias's text when a command ended."""
    texts = [move.data.decode() for move in model.moves if move.when <= command.ended]
    return texts[-1].splitlines() if texts else []


def recover(history: History, model: Model, url: str, roots: list[Path]) -> None:
    """An hour later, without faults: each version can be published or is another's, gc removes all that is unused."""
    history.faults, history.now = False, history.now + 5000
    assert not model.torn() or any(isinstance(done.error, UNSURE) for done in history.commands)
    last = [("publish", lambda: publish(roots[2], url, ["prod"])), ("gc", lambda: collect(url))]
    history.run([[*begin(url, roots), *last]])
    assert not [done for done in history.commands[-4:] if done.error is not None]
    assert not model.torn()
    assert model.blobs == set().union(*model.releases.values())
    assert not list(history.inner.list("leases"))
    assert not list(history.inner.list("collections"))


def play_in_folder(seed: int, roots: list[Path]) -> Model:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, pytest.MonkeyPatch.context() as monkeypatch:
        return play(seed, FolderBucket(Path(folder)), roots, monkeypatch)


MOVED_TWICE = (297, 441)
"""Seeds in which a request was carried out, repeated and refused, and the command moved the alias a second time."""


@pytest.mark.parametrize("seed", (*range(30), *MOVED_TWICE))
def test_history(roots, seed):
    play_in_folder(seed, roots)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_histories(roots, hundred):
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        try:
            play_in_folder(seed, roots)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.server
@pytest.mark.parametrize("seed", range(25))
def test_history_in_s3(roots, s3_url, seed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        play(seed, open_bucket(s3_url), roots, monkeypatch)


def test_a_seed_is_a_history(roots):
    first, second = (play_in_folder(7, roots).history for _ in range(2))
    assert [(e.when, e.process, e.kind, e.key) for e in first.effects] == [
        (e.when, e.process, e.kind, e.key) for e in second.effects
    ]
