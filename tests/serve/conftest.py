"""A served artifact, once for all files of the lane `vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vllm_server import RECIPE, Server, built, running


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validated artifact of a tiny pair."""
    return built(tmp_path_factory.mktemp("served"), RECIPE)


@pytest.fixture(scope="session")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    # Random weights write white space without end.
    grammars = ("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}')
    chunks = ("--additional-config", '{"tandem": {"prefill_tokens": 8}}')  # of prompts, beside running requests
    with running(artifact, tmp_path_factory.mktemp("log") / "vllm.log", *tools, *grammars, *chunks) as found:
        yield found
