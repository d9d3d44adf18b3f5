"""`tandem serve` of a tiny pair over loopback, for the tests of the lane `vllm`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.paths import ROOT

TARGET = "pico://llama?layers=2"
RECIPE = f"""
name: served
target: {{source: "{TARGET}", dtype: float32}}
draft: {{derive: {{from: target, layers: [0]}}}}
speculation: {{draft_tokens: [2], sampling: [greedy, stochastic, shaped]}}
shapes: {{batch: [1, 4], prefill: [32], kv: [96]}}
validate: {{prompts: pico.jsonl, max_new_tokens: 12, gates: {{tokens_per_step: 1.05}}}}
"""
START_SECONDS = 240


def built(base: Path, recipe: str, out: str = "served", cache: Path | None = None) -> Path:
    """A validated artifact of a recipe; `cache`: one that other runs share."""
    from pipeline.build import BuildSettings, run
    from pipeline.recipe import load

    shutil.copy(ROOT / "recipes/prompts/pico.jsonl", base)
    (base / "served.yaml").write_text(recipe)
    made = load(base / "served.yaml")
    run(BuildSettings(recipe=made, base=base, out=base / out, cache=cache or base / "cache", workers=2))
    return base / out


class Server:
    """`tandem serve` in a process group of its own."""

    def __init__(self, artifact: Path, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [sys.executable, "-c", "from pipeline.cli.main import main; main()", "serve", str(artifact)]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--host", "127.0.0.1", *arguments],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait(self) -> None:
        """Until it is healthy."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"not healthy: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """As the kernel would, all of it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str, body: object) -> tuple[int, dict]:
        """Status and answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt: list[int], **how: object) -> dict:
        """One completion of token ids."""
        body = {"model": "served", "prompt": prompt, "temperature": 0, "return_token_ids": True} | how
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]

    def metrics(self, group: str = "spec_decode") -> dict[str, float]:
        """vLLM's counters of speculation, or of another group."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = (re.match(rf"vllm:{group}_(\w+)_total\{{([^}}]*)\}} (\S+)", line) for line in lines)
        return {m[1] + "".join(re.findall(r'position="(\d)"', m[2])): float(m[3]) for m in found if m}


@contextmanager
def running(artifact: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """A healthy server, killed at the end."""
    server = Server(artifact, log, *arguments)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + 3 * j) % 200 + 3 for j in range(1 + i % 30)] for i in range(count)]
