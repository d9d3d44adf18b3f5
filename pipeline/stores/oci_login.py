"""Credentials for OCI registries, from where Docker, Podman and their helpers keep them. Sends no request.

Files: `$DOCKER_CONFIG/config.json` (default `~/.docker/config.json`), `$REGISTRY_AUTH_FILE`, and Podman's
`$XDG_RUNTIME_DIR/containers/auth.json`. Helpers are the programs `docker-credential-NAME` that a file names.
Formats: docs.docker.com/reference/cli/docker/login, and containers-auth.json(5).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import HostError
from pipeline.files.home import expanded, has_home

HUB_KEY = "https://index.docker.io/v1/"
"""Docker's name for the credentials of `docker.io`."""
HUB_HOSTS = ("docker.io", "registry-1.docker.io", "index.docker.io")
HELPER = re.compile(r"[\w.-]+")
HELPER_S = 60
BY_TOKEN = "<token>"  # noqa: S105 - the user name that helpers give with a refresh token
FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Login:
    """A user and a password, or a refresh token (then `username` is empty)."""

    username: str
    secret: str

    @property
    def basic(self) -> str:
        """The value of a header `Authorization`."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.secret}".encode()).decode()


def login_for(host: str, repository: str) -> Login | None:
    """Return the credentials for a repository of a registry; None if no file has any.

    Raises:
        HostError: a file of credentials cannot be read, or a helper is missing or fails.

    """
    for path in _files():
        content = _read(path)
        login = _from_helper(content, host, path) or _from_auths(content, host, repository, path)
        if login is not None:
            return login
    return None


def _files() -> Iterator[Path]:
    folder = os.environ.get("DOCKER_CONFIG")
    if folder:
        yield Path(folder) / "config.json"
    elif has_home():
        yield expanded("~/.docker/config.json")
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers/auth.json"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        what = "the file of registry credentials cannot be read as JSON"
        raise HostError(what, where=str(path), fix="repair it, or run `docker login` again") from error
    return content if isinstance(content, dict) else {}


def _from_helper(content: Mapping[str, Any], host: str, path: Path) -> Login | None:
    helpers, keys = content.get("credHelpers"), _keys(host)
    named = [helpers[key] for key in keys if key in helpers] if isinstance(helpers, dict) else []
    name = next(iter(named), content.get("credsStore"))
    if not isinstance(name, str) or not name:
        return None
    program = shutil.which(f"docker-credential-{name}") if HELPER.fullmatch(name) else None
    if program is None:
        what = f"the credential helper docker-credential-{name} is not on PATH"
        raise HostError(what, where=str(path), fix="install it, or remove it from this file and run `docker login`")
    answer = _ask(program, keys[0], path)
    if answer is None:
        return None
    username, secret = str(answer.get("Username", "")), str(answer.get("Secret", ""))
    return Login("" if username == BY_TOKEN else username, secret) if secret else None


def _ask(program: str, key: str, path: Path) -> Mapping[str, Any] | None:
    """Return a helper's answer; None if it has no credentials for this registry."""
    try:
        done = subprocess.run(  # the user's own configuration names it
            [program, "get"], input=key, capture_output=True, text=True, encoding="utf-8", timeout=HELPER_S, check=False
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        what = f"{Path(program).name} gave no answer within {HELPER_S} s, or none that is JSON"
        raise HostError(what, where=str(path), fix=f"run `echo {key} | {program} get` to see why") from error
    if answer is None and "not found" not in done.stdout + done.stderr:
        what = f"{Path(program).name} failed with exit code {done.returncode}"
        raise HostError(what, where=str(path), fix=f"run `echo {key} | {program} get` to see why")
    return answer if isinstance(answer, dict) else None


def _from_auths(content: Mapping[str, Any], host: str, repository: str, path: Path) -> Login | None:
    """Return the entry for the longest part of `host/repository` that has one."""
    auths = content.get("auths")
    if not isinstance(auths, dict):
        return None
    parts = repository.split("/")
    longer = ["/".join([host, *parts[:count]]) for count in range(len(parts), 0, -1)]
    for key in (*longer, *_keys(host)):
        if isinstance(entry := auths.get(key), dict) and (login := _entry(entry, key, path)) is not None:
            return login
    return None


def _entry(entry: Mapping[str, Any], key: str, path: Path) -> Login | None:
    if isinstance(token := entry.get("identitytoken"), str) and token:
        return Login("", token)
    text = entry.get("auth")
    if not isinstance(text, str) or not text:
        return None
    try:
        username, separator, secret = base64.b64decode(text, validate=True).decode().partition(":")
    except (binascii.Error, ValueError) as error:
        raise _malformed(key, path) from error
    if not separator:
        raise _malformed(key, path)
    return Login(username, secret.rstrip("\0"))


def _malformed(key: str, path: Path) -> HostError:
    fix = f"run `docker login {key}` again"
    return HostError(f"auths.{key}.auth: not base64 of user:password", where=str(path), fix=fix)


def _keys(host: str) -> tuple[str, ...]:
    if host in HUB_HOSTS:
        return (HUB_KEY, *HUB_HOSTS)
    return (host, f"https://{host}", f"https://{host}/", f"http://{host}", f"https://{host}/v2/", f"https://{host}/v1/")
