"""Targets that people write: recipes, locks, prompts, logs of requests, policies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.artifact.signing import read_policy
from pipeline.distill.prompts import read_prompts, read_transcripts
from pipeline.errors import TandemError
from pipeline.measure.traffic import Room, read_traffic
from pipeline.plan import lock as locks
from pipeline.plan.plan import make_plan
from pipeline.recipe import load
from pipeline.recipe.edit import read_text
from pipeline.validate.prompts import load_prompts
from support.paths import ROOT

SUFFIXES = (".jsonl", ".csv", ".json", ".yaml")


def each_alone(*readers: Callable[[], object]) -> None:
    """Call all of several readers of one input; raise the last of their errors."""
    failure: TandemError | None = None
    for read in readers:
        try:
            read()
        except TandemError as error:
            failure = error
    if failure is not None:
        raise failure


def recipe_target(folder: Path) -> Callable[[bytes], object]:
    """A recipe, read for a build and for an edit; `base.yaml` is beside it."""
    shutil.copy(ROOT / "tests/fuzz/corpus/recipe/valid-small.yaml", folder / "base.yaml")
    path = folder / "recipe.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        each_alone(lambda: load(path), lambda: read_text(path))

    return read


def lock_target(folder: Path) -> Callable[[bytes], object]:
    """A lock: what it says of the pair, and the plan that a build on another host makes from it."""
    recipe = load(ROOT / "tests/fuzz/corpus/recipe/valid-small.yaml")
    path = folder / "small.lock"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = locks.read(path)
        locks.to_bytes(found)
        locks.stale(recipe, found)
        make_plan(recipe, *locks.pair_configs(recipe, found, str(path)))

    return read


def prompts_target(folder: Path) -> Callable[[bytes], object]:
    """Prompts of the gates, prompts to train on, transcripts."""
    path = folder / "prompts.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(TandemError):
            read_transcripts(path)
        each_alone(lambda: load_prompts(path), lambda: read_prompts(path))

    return read


def traffic_target(folder: Path) -> Callable[[bytes], object]:
    """A log or histogram of lengths."""
    paths = [folder / f"traffic{suffix}" for suffix in SUFFIXES]

    def read(data: bytes) -> None:
        path = paths[data[0] % len(paths) if data else 0]
        path.write_bytes(data[1:])
        read_traffic(path, Room(2048, 8192))

    return read


def policy_target(folder: Path) -> Callable[[bytes], object]:
    """A policy, and what it says of an unsigned release."""
    path = folder / "policy.yaml"
    shutil.copy(ROOT / "tests/fuzz/corpus/release.pub", folder / "release.pub")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        policy = read_policy(path)
        with suppress(TandemError):
            policy.check(b"{}", [], "/srv/registry/small@1")
        with suppress(TandemError):
            policy.check_builder(lambda: b"{}", "s3://bucket/small@1")

    return read
