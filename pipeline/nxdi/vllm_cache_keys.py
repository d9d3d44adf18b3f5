"""The graphs that a server looks up in a compile cache: read from a file, and compared with a cache before a start.

A server without one of its graphs compiles for minutes or, if that is forbidden, ends when it has loaded its weights.
The keys follow from graphs of the plugin, which Tandem cannot make: they are those of a server that finished its
warm-up. Starts no server, and copies nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact.manifest import CacheBackend, CacheManifest, read
from pipeline.artifact.verify import difference
from pipeline.errors import ArtifactError, InputError, reason
from pipeline.nxdi.vllm_cache import CACHE_FOLDER, absent, check_same_host, foreign, shown
from pipeline.nxdi.vllm_cache_layout import KEY, NKI, entry_faults

COMMENT = "#"


@dataclass(frozen=True)
class Checked:
    """A cache that has every graph of an artifact. `unchecked` packages are not installed on this host."""

    cache_root: str
    graphs: int
    unchecked: tuple[str, ...]


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys in a text file: one key a line, empty lines and lines with `#` are skipped; sorted.

    Raises:
        InputError: the file cannot be read, has no key, or has a line that is not a key.

    """
    try:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {reason(error)}", where=str(path), fix="write one key a line") from error
    keys = {line: text.strip() for line, text in lines if text.strip() and not text.strip().startswith(COMMENT)}
    for line, key in keys.items():
        if not KEY.fullmatch(key):
            what = f"found {key[:60]!r}, expected a key: 32 hexadecimal digits in lower case"
            raise InputError(what, where=f"{path}:{line}", fix="write the names of the cache's folders, one a line")
    if not keys:
        fix = "write one key a line, or omit --expect to pack all graphs of the cache"
        raise InputError("no key in the file", where=str(path), fix=fix)
    return tuple(sorted({*keys.values()}))


def check(root: Path, cache_root: Path, *, host: Mapping[str, str], versions: Mapping[str, str]) -> Checked:
    """Compare vLLM's cache with the graphs that an artifact's manifest lists; of the artifact, read the manifest alone.

    `host` and `versions` as `install` takes them. A graph is there if all its files have the digests of the manifest.

    Raises:
        InputError: an artifact of another kind.
        ArtifactError: missing, incomplete or different graphs or kernels; another chip; other package versions.

    """
    manifest, base = read(root).manifest, cache_root.absolute()
    if not isinstance(manifest, CacheManifest):
        raise InputError("not a compile cache", where=str(root), fix=f"show its kind: tandem inspect {root}")
    if faults := foreign(manifest):
        raise ArtifactError(shown(faults), where=str(root), fix="do not use this artifact; pack the cache again")
    check_same_host(manifest, host, versions)
    expects = expected(manifest.backend, manifest)
    there = [key for key in expects if os.path.lexists(base / CACHE_FOLDER / key)]
    faults = absent(expects, there, "the cache")
    faults += [fault for key in there for fault in entry_faults(base / CACHE_FOLDER / key)]
    damaged = {fault.partition(":")[0] for fault in faults}
    faults += _differences(manifest, base, [key for key in [*there, NKI] if key not in damaged])
    if faults:
        fix = f"remove these graphs, then run: tandem vllm-cache install {root} --cache-root {base}"
        raise ArtifactError(shown(faults), where=str(base / CACHE_FOLDER), fix=fix)
    unchecked = tuple(name for name in manifest.toolchain if name != "backend" and name not in versions)
    return Checked(str(base), len(expects), unchecked)


def expected(facts: CacheBackend, manifest: CacheManifest) -> tuple[str, ...]:
    """Return the keys that a server looks up; of an artifact of an earlier version, those of its files."""
    packed = {name.split("/")[2] for name in manifest.files} - {NKI}
    return facts.expects or tuple(sorted(packed))


def _differences(manifest: CacheManifest, base: Path, tops: list[str]) -> list[str]:
    """Return the files of these entries, or of kernels, that are missing or differ from the manifest."""
    files = {name: entry for name, entry in manifest.files.items() if name.split("/")[2] in tops}
    faults = []
    for name, entry in sorted(files.items()):
        fault = difference(base / name, entry) if (base / name).is_file() else "missing"
        if fault:
            faults.append(f"{Path(name).relative_to(CACHE_FOLDER)}: {fault}")
    return faults
