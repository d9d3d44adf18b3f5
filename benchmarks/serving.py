"""An artifact served by vLLM beside plain vLLM on the same target: throughput, latency, start-up.

    python benchmarks/serving.py [ARTIFACT] [--recipe RECIPE] [--rounds 3] [--requests 8] [--max-tokens 64]

To be run by the environment that has vLLM (`make test-vllm` makes one). Both servers start cold, one after the other,
and are timed from their start to their first token; plain vLLM runs with its defaults for the CPU (torch.compile on),
from an empty compile cache. Then both stay up and take turns: at each concurrency, each round sends the same chat
prompts, greedy, to one and then to the other. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.cache.local import default_root
from pipeline.recipe import load
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.validate.prompts import load_prompts, prompts_path

MODULE = ["-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]


def export(target: Checkpoint, folder: Path) -> Path:
    """The target as a folder that plain vLLM opens, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: read_tensor(r).to(torch.bfloat16) for n, r in weights(target).items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = dict(target.config_json) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, data in tokenizer_files(target).items():
        (folder / name).write_bytes(data)
    return folder


class Server:
    """A server on a free port, or on one that is given."""

    def __init__(self, command: list[str], log: Path, port: int | None = None, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        self.started = time.perf_counter()
        with log.open("a", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command, "--port", str(self.port), "--served-model-name", "m"],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | environment,
            )  # fmt: skip

    def first_token(self, prompt: str) -> float:
        """Seconds from its start to its first token."""
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}")
            try:
                self.ask(prompt, 1)
            except OSError:
                time.sleep(0.25)
            else:
                return time.perf_counter() - self.started

    def ask(self, prompt: str, limit: int) -> tuple[int, float, float]:
        """Tokens of an answer, seconds to its first token, seconds in all."""
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": limit, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        started, first, tokens = time.perf_counter(), 0.0, 0
        with urllib.request.urlopen(request, timeout=600) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event: dict[str, Any] = json.loads(line[6:])
                if event["choices"] and event["choices"][0]["delta"].get("content") and not first:
                    first = time.perf_counter() - started
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        return tokens, first, time.perf_counter() - started

    def round(self, prompts: list[str], limit: int, together: int) -> tuple[float, float]:
        """Tokens a second over all prompts, and the median time to a first token."""
        started = time.perf_counter()
        with ThreadPoolExecutor(together) as pool:
            answers = list(pool.map(lambda prompt: self.ask(prompt, limit), prompts))
        return sum(a[0] for a in answers) / (time.perf_counter() - started), median(a[1] for a in answers)

    def end(self) -> None:
        """All of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2-135m-spec.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    asked = parser.parse_args()
    recipe = load(asked.recipe)
    target, _ = resolve_pair(recipe, base=asked.recipe.parent, cache=default_root() / "sources")
    shipped = load_prompts(prompts_path(recipe.validate_.prompts, asked.recipe.parent))
    prompts = [prompt.text for prompt in shipped[:: max(1, len(shipped) // asked.requests)]][: asked.requests]
    with tempfile.TemporaryDirectory() as work:
        plain = export(target, Path(work) / "target")
        length = str(recipe.shapes.kv[-1])
        servers: dict[str, Server] = {}
        try:
            for name, command, environment in (
                ("artifact", [*MODULE, "--model", str(asked.artifact)], {}),
                ("plain vLLM", [*MODULE, "--model", str(plain), "--max-model-len", length, "--dtype", "bfloat16"],
                 {"VLLM_CACHE_ROOT": f"{work}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor",
                  "VLLM_CPU_KVCACHE_SPACE": "2"}),
            ):  # fmt: skip
                servers[name] = Server(command, Path(work) / f"{name}.log", **environment)
                print(f"{name}: {servers[name].first_token(prompts[0]):.1f} s from its start to its first token")
            for together in (1, 4, 8):
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
                for _ in range(asked.rounds):
                    for name, server in servers.items():
                        found[name].append(server.round(prompts, asked.max_tokens, together))
                speed = {name: median(one[0] for one in rounds) for name, rounds in found.items()}
                first = {name: median(one[1] for one in rounds) for name, rounds in found.items()}
                shown = "; ".join(f"{n} {speed[n]:.1f} tok/s, first token {first[n] * 1000:.0f} ms" for n in servers)
                print(f"{together} at once: {shown}; ratio {speed['artifact'] / speed['plain vLLM']:.2f}", flush=True)
        finally:
            for server in servers.values():
                server.end()


if __name__ == "__main__":
    main()
