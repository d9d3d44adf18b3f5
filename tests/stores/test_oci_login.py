"""Credentials as Docker, Podman and their helpers keep them."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from pipeline.errors import HostError
from pipeline.stores.oci_login import HUB_KEY, Login, login_for


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def helper(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_no_file(docker):
    assert login_for("ghcr.io", "org/name") is None


@pytest.mark.parametrize("key", ["ghcr.io", "https://ghcr.io", "https://ghcr.io/v2/"])
def test_docker_login(docker, key):
    docker.write_text(json.dumps({"auths": {key: {"auth": encoded("user:pass:word")}}}))
    login = login_for("ghcr.io", "org/name")
    assert login == Login("user", "pass:word")
    assert login.basic == f"Basic {encoded('user:pass:word')}"


def test_docker_hub_has_a_name_of_its_own(docker):
    docker.write_text(json.dumps({"auths": {HUB_KEY: {"auth": encoded("user:secret")}}}))
    assert login_for("docker.io", "org/name") == Login("user", "secret")


def test_identity_token(docker):
    docker.write_text(json.dumps({"auths": {"x.azurecr.io": {"auth": encoded("0:"), "identitytoken": "refresh"}}}))
    assert login_for("x.azurecr.io", "name") == Login("", "refresh")


def test_podman_prefers_the_longest_path(docker, monkeypatch, tmp_path):
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {
        "quay.io": {"auth": encoded("all:1")}, "quay.io/org": {"auth": encoded("org:2")},
    }}))  # fmt: skip
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
    assert login_for("quay.io", "org/name") == Login("org", "2")
    assert login_for("quay.io", "other/name") == Login("all", "1")


def test_helper_of_a_registry(docker, tmp_path, monkeypatch):
    helper(
        tmp_path, "test", """read host; echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"for $host\\"}" """, monkeypatch
    )
    docker.write_text(json.dumps({"credHelpers": {"gcr.io": "test"}, "auths": {"gcr.io": {"auth": encoded("a:b")}}}))
    assert login_for("gcr.io", "name") == Login("u", "for gcr.io")


def test_helper_with_a_refresh_token(docker, tmp_path, monkeypatch):
    helper(tmp_path, "test", """echo '{"Username": "<token>", "Secret": "t"}'""", monkeypatch)
    docker.write_text(json.dumps({"credsStore": "test"}))
    assert login_for("x.azurecr.io", "name") == Login("", "t")


def test_helper_without_credentials(docker, tmp_path, monkeypatch):
    helper(tmp_path, "test", "echo credentials not found in native keychain; exit 1", monkeypatch)
    docker.write_text(json.dumps({"credsStore": "test"}))
    assert login_for("ghcr.io", "name") is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "cannot be read as JSON"),
        (json.dumps({"credsStore": "absent"}), "docker-credential-absent is not on PATH"),
        (json.dumps({"credsStore": "../../bin/sh"}), "is not on PATH"),
        (json.dumps({"auths": {"ghcr.io": {"auth": "%%%"}}}), "not base64 of user:password"),
        (json.dumps({"auths": {"ghcr.io": {"auth": encoded("nobody")}}}), "not base64 of user:password"),
    ],
)
def test_files_that_cannot_be_used(docker, content, what):
    docker.write_text(content)
    with pytest.raises(HostError, match=what) as caught:
        login_for("ghcr.io", "name")
    assert caught.value.where == str(docker)
    assert caught.value.fix


def test_helper_that_fails_is_named(docker, tmp_path, monkeypatch):
    helper(tmp_path, "test", "echo locked >&2; exit 3", monkeypatch)
    docker.write_text(json.dumps({"credsStore": "test"}))
    with pytest.raises(HostError, match="docker-credential-test failed with exit code 3"):
        login_for("ghcr.io", "name")
