"""Passwords and tokens of OCI registries: Docker's registry with users, and with a token server of its own."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import HostError
from pipeline.registry.publish import publish
from pipeline.registry.pull import pull
from pipeline.stores.base import open_store
from support import oci_registry, token_server
from support import small_artifacts as small

pytestmark = pytest.mark.server
USER = "tests:$2b$05$CtBd1jTCDEaBLpso/vZ6Oe9oqz48ni6VPT/DnHn0PzAGRjaZ.AYsC"  # secret


@pytest.fixture
def guarded(tmp_path, monkeypatch) -> Iterator[str]:
    """A registry with a user `tests` and the password `secret`."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "htpasswd").write_text(USER)
    with oci_registry.running("distribution", oci_registry.HTPASSWD.format(path=tmp_path / "htpasswd")) as registry:
        yield registry.host


@pytest.fixture
def tokens(tmp_path, monkeypatch) -> Iterator[tuple[str, token_server.Tokens]]:
    """A registry that wants tokens of a server of its own, as those of clouds do."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with token_server.running(tmp_path) as server, oci_registry.running("distribution", server.auth) as registry:
        yield registry.host, server


def log_in(folder: Path, host: str, text: str) -> None:
    auth = base64.b64encode(text.encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def test_password_of_docker_login(made, guarded, options, tmp_path):
    url = f"oci://{guarded}/org"
    with pytest.raises(HostError, match="no credentials for") as caught:
        publish(made, url)
    assert caught.value.fix == f"run `docker login {guarded}` with an account that may read"
    log_in(tmp_path, guarded, "tests:wrong")
    with pytest.raises(HostError, match="these credentials do not allow") as caught:
        publish(made, url)
    assert "wrong" not in str(caught.value)
    log_in(tmp_path, guarded, "tests:secret")
    publish(made, url, ["latest"])
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(made)


def test_token_of_a_user(made, tokens, options, tmp_path):
    host, server = tokens
    url = f"oci://{host}/org"
    with pytest.raises(HostError, match="no credentials for"):
        publish(made, url)
    log_in(tmp_path, host, "tests:secret")
    publish(made, url, ["latest"])
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(made)
    assert {"repository:org/small:pull", "repository:org/small:pull,push"} <= set(server.scopes)


def test_token_that_expires_is_renewed(made, tokens, options, tmp_path):
    host, server = tokens
    log_in(tmp_path, host, "tests:secret")
    server.lives_s = -58  # the registry allows a minute of clock difference
    url = f"oci://{host}/org"
    publish(made, url)
    store = open_store(url)
    assert store.versions("small")
    before = len(server.scopes)
    time.sleep(4)
    assert store.versions("small")
    assert len(server.scopes) > before


def test_refresh_token_of_a_helper(made, tokens, tmp_path):
    host, server = tokens
    (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"identitytoken": "refresh-secret"}}}))
    publish(made, f"oci://{host}/org")
    assert server.refreshed
