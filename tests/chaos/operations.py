"""The commands that are disturbed, the template that they start from, and what must hold while and after they run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from chaos.world import World, digests
from pipeline.artifact.verify import verify
from pipeline.files.unfinished import TEMP
from pipeline.registry.aliases import set_alias
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import Selection, pull
from pipeline.registry.releases import list_releases
from pipeline.stores.base import open_store
from support import small_artifacts as small
from support import tiny_build

VERSIONS = ("1", "2", "3")
"""Releases 1 and 2 are in the registry, 3 is published by a command."""

ALIAS = "prod"
HOUR_S = 4000.0
SERVED = ("artifacts", "pulled", "small")
"""Where `tandem serve` pulls the release to."""
LOST_BLOB = "ab" + "0" * 62


@dataclass(frozen=True)
class Operation:
    """A command; `check` is what a reader may see at any time, `result` what the command leaves when it succeeded."""

    name: str
    command: tuple[str, ...]
    check: Callable[[World], None]
    result: Callable[[World], object]
    needs_build: bool = False
    has_workers: bool = False


def make_template(root: Path) -> None:
    """Write artifacts, a registry with an alias that was moved and an unused blob, a pulled artifact and a cache."""
    for version in VERSIONS:
        made = small.make_validated(
            root / "made" / version,
            root / "made/work",
            weights=b"w" * int(version),
            graph=b"g%s" % version.encode(),
            size=3000,
        )
        (root / "artifacts").mkdir(exist_ok=True)
        shutil.copytree(made.root, root / "artifacts" / version)
    shutil.rmtree(root / "made")
    url = str(root / "registry")
    for version in VERSIONS[:2]:
        publish(root / "artifacts" / version, url, [], PublishSettings(version=version))
        set_alias(url, f"small@{version}", ALIAS)
    unused = root / "registry/blobs/sha256/ab" / LOST_BLOB
    unused.parent.mkdir(exist_ok=True)
    unused.write_bytes(b"of no release")
    pull(f"{url}/small@1", root / "pulled", cache=root / "cache")
    (root / "tmp").mkdir()


def add_build(root: Path, cache: Path) -> None:
    """Add the tiny recipe, and a cache with all of its graphs but one; `cache` keeps them between sessions."""
    (root / "recipe").mkdir()
    request = tiny_build.request_in(root / "recipe")
    kept = tiny_build.again(request, cache=cache, out=cache.parent / "kept", validate=False)
    assert kept.artifact.is_dir()
    shutil.copytree(cache, root / "cache", dirs_exist_ok=True)
    shutil.rmtree(root / "cache/stamps", ignore_errors=True)
    lost = tiny_build.cheapest_graph(replace(request, out=kept.artifact))
    tiny_build.forget(root / "cache", lost.key)


def check_registry(world: World) -> None:
    """Every listed release is whole, and pulls as it was published; the alias points at one of them."""
    listed = {each.version: each for each in list_releases(str(world.registry))}
    assert set(VERSIONS[:2]) <= set(listed) <= set(VERSIONS), f"releases: {sorted(listed)}"
    assert not [each.damage for each in listed.values() if each.damage]
    for alias, version in open_store(str(world.registry)).aliases("small").items():
        assert version in listed, f"alias {alias} points at {version!r}"
    reader = world.control.parent / "reader"
    for version in listed:
        out = pull(
            f"{world.registry}/small@{version}", reader / "out", cache=reader / "cache", select=Selection(yanked=True)
        )
        found = small.digests(out)
        assert found == small.digests(world.path("artifacts", version)), f"release {version} differs"
        shutil.rmtree(reader)


def check_pulled(world: World) -> None:
    """The folder is there, and has one whole release."""
    check_registry(world)
    verify(world.path("pulled"))
    known = [small.digests(world.path("artifacts", version)) for version in VERSIONS]
    assert small.digests(world.path("pulled")) in known


def check_served(world: World) -> None:
    """What a server would open is absent, or a whole release."""
    check_registry(world)
    if world.path(*SERVED).exists():
        verify(world.path(*SERVED))
        assert served_of(world) in [small.digests(world.path("artifacts", version)) for version in VERSIONS]


def check_built(world: World) -> None:
    """The artifact is absent, or whole."""
    if world.path("out").exists():
        verify(world.path("out"))


def registry_of(world: World) -> object:
    """Return what a registry holds: blobs and releases by their bytes, aliases and yanks without their times."""
    files = digests(world.registry)
    objects = {name: digest for name, digest in files.items() if name.startswith(("blobs/", "releases/"))}
    store = open_store(str(world.registry))
    moves = {
        alias: [m.version for m in found.moves]
        for alias in store.aliases("small")
        if (found := store.read_alias("small", alias))
    }
    yanks = {v: yank.reason for v in store.versions("small") if (yank := store.read_yank("small", v))}
    return objects, moves, yanks


def pulled_of(world: World) -> object:
    return small.digests(world.path("pulled"))


def served_of(world: World) -> object:
    return small.digests(world.path(*SERVED))


def built_of(world: World) -> object:
    return tiny_build.same_parts(world.path("out"))


BUILD = ("build", "recipe/tiny.yaml", "--out", "out", "--no-validate", "--workers", "2")
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("publish", ("publish", "artifacts/3", "--to", "registry", "--version", "3", "--alias", ALIAS),
                  check_registry, registry_of),
        Operation("pull", ("pull", f"registry/small@{ALIAS}", "pulled"), check_pulled, pulled_of),
        Operation("set", ("alias", "set", "registry/small@1", "canary"), check_registry, registry_of),
        Operation("rollback", ("alias", "rollback", f"registry/small@{ALIAS}", "--from", "2"), check_registry,
                  registry_of),
        Operation("yank", ("yank", "registry/small@1", "--reason", "bad"), check_registry, registry_of),
        Operation("gc", ("gc", "registry"), check_registry, registry_of),
        Operation("serve", ("serve", f"registry/small@{ALIAS}", "--json"), check_served, served_of),
        Operation("build", BUILD, check_built, built_of, needs_build=True, has_workers=True),
        Operation("push", (*BUILD, "--remote-cache", "shared", "--push-cache"), check_built, built_of, needs_build=True,
                  has_workers=True),
    )
}  # fmt: skip
"""`serve` ends where vLLM would start: `tests/serve/test_vllm.py` and `benchmarks/soak_chaos.py` end real servers."""


def an_hour_later(world: World) -> None:
    """Let leases and marks of killed commands be an hour old, by the clock of the registry's disk."""
    for folder in ("leases", "collections"):
        for path in (world.registry / folder).glob("*"):
            stat = path.stat()
            os.utime(path, (stat.st_atime - HOUR_S, stat.st_mtime - HOUR_S))


def leftovers(world: World) -> list[str]:
    """Return what no command will remove: temporary names, leases, parts of blobs, files in TMPDIR."""
    names = [
        path.relative_to(world.root).as_posix()
        for path in world.root.rglob("*")
        if not path.is_dir() or path.name.startswith(TEMP)
    ]
    found = [name for name in names if TEMP in name or name.endswith(".partial")]
    marks = [name for name in names if name.startswith(("registry/leases/", "registry/collections/"))]
    found += [name for name in marks if not name.endswith(".lock")]
    found += [f"tmp/{path.name}" for path in world.temporary.iterdir() if not path.name.startswith("tandem-inductor-")]
    return sorted(set(found))
