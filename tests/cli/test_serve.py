"""serve: what is checked and said before vLLM starts. `tests/serve/test_vllm.py` starts a real server."""

from __future__ import annotations

import json
import os
import socket

import pytest

from pipeline.cli import serve
from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair


@pytest.fixture
def started(tmp_path, monkeypatch) -> list[list[str]]:
    """An artifact `out`, and the commands that would replace this process; vLLM is not needed."""
    monkeypatch.chdir(tmp_path)
    small.make_validated(tmp_path / "out", tmp_path / "work")
    commands: list[list[str]] = []
    monkeypatch.setattr(serve, "_check_packages", lambda *_, **__: None)
    monkeypatch.setattr(os, "execve", lambda _, command, __: commands.append(command))
    return commands


@pytest.mark.parametrize("form", ["--port {}", "--port={}"])
def test_serve_at_a_port_in_use_is_one_error(started, form):
    """vLLM ended in a traceback, after it had loaded the model."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = invoke("serve", "out", "--host", "127.0.0.1", *form.format(port).split())
    assert result.exit_code == 3
    assert f"environment: --port: {port} is in use\n  fix: choose a free port: --port N\n" in result.stderr
    assert started == []


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1"])
def test_serve_at_an_address_of_another_machine(started, host):
    result = invoke("serve", "out", "--host", host)
    assert result.exit_code == 3
    assert f"--host: {host} is not an address of this machine" in result.stderr


def test_serve_says_what_it_serves_and_where(started, tmp_path):
    """It printed nothing of its own before vLLM's log."""
    key, public = key_pair(tmp_path, "release")
    answer("sign", "out", "--key", key)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shown = answer("serve", "out", "--host", "127.0.0.1", "--port", str(port), "--require-signature", public).stderr
    version = json.loads((tmp_path / "out/manifest.json").read_text())["version"]
    assert shown.startswith(
        f"starting vLLM for small {version}, signed by {public}, at http://127.0.0.1:{port}; its log"
    )
    assert len(started) == 1


def test_serve_through_a_unix_socket_checks_no_port(started):
    assert "http://" not in answer("serve", "out", "--uds", "/tmp/s").stderr
    assert len(started) == 1


def test_serve_json_prints_the_command_without_vllm(tmp_path, monkeypatch):
    """vLLM had to be installed to print its command."""
    monkeypatch.chdir(tmp_path)
    small.make_validated(tmp_path / "out", tmp_path / "work")
    assert "vllm.entrypoints.openai.api_server" in json.loads(answer("serve", "out", "--json").stdout)["command"]


@pytest.mark.parametrize("words", [["--max-model-len", "4096"], ["--max-model-len=4096"], ["--max-num-seqs", "99"]])
def test_serve_refuses_a_limit_above_the_artifacts_before_vllm_starts(started, words):
    """vLLM ended in a traceback after 40 seconds, which advised VLLM_ALLOW_LONG_MAX_MODEL_LEN."""
    result = invoke("serve", "out", "--uds", "/tmp/s", *words)
    flag = words[0].partition("=")[0]
    assert result.exit_code == 2
    assert f"{flag}: found " in result.stderr
    assert "the artifact's graphs hold at most" in result.stderr
    assert started == []


def test_serve_with_a_smaller_limit_starts(started):
    answer("serve", "out", "--uds", "/tmp/s", "--max-model-len", "4", "--max-num-seqs", "1")
    assert len(started) == 1


def test_serve_that_shows_help_says_nothing_of_a_start(started):
    assert answer("serve", "out", "--uds", "/tmp/s", "--", "--help=all").stderr == ""
    assert len(started) == 1
