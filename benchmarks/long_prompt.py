"""What a long prompt does to a running answer: time between its pieces while `tandem serve` reads the prompt.

    python benchmarks/long_prompt.py [ARTIFACT] [--tokens 900] [--rounds 5]

To be run by the environment that has vLLM (`make test-vllm` makes one). A stream of tokens runs alone, and then while a
prompt of `--tokens` tokens arrives; once with the server's own budget of prompt tokens for each step, and once with
prompts read whole. Prefix caching is off. Figures are over all rounds; pieces are a step's tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from threading import Thread

PIECES_BEFORE = 8
"""Pieces of the stream before the long prompt arrives."""
WHOLE = {"tandem": {"prefill_tokens": 1_000_000}}


def served(artifact: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A server that answers, in a process group of its own, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-c", "from pipeline.cli.main import main; main()", "serve", str(artifact)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--no-enable-prefix-caching", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"the server ended: {process.args}") from None
            time.sleep(0.5)
        else:
            return process, port


def pieces(port: int, prompt: list[int], most: int, arrivals: list[float]) -> None:
    """Append the moments at which pieces of an answer arrive."""
    body = {"model": model(port), "prompt": prompt, "max_tokens": most, "temperature": 0, "ignore_eos": True,
            "stream": True}  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())  # noqa: PERF401 - another thread watches the list


def model(port: int) -> str:
    """Name of the served model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name


def measure(port: int, tokens: int, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds between pieces alone, the same while a long prompt is read, and the time of its first token."""
    alone, beside, firsts = [], [], []
    short, long = [100 + number for number in range(20)], [50 + number % 4000 for number in range(tokens)]
    for turn in range(rounds + 1):
        arrivals: list[float] = []
        pieces(port, [*short, turn], 100, arrivals)
        undisturbed = gaps(arrivals)
        arrivals = []
        stream = Thread(target=pieces, args=(port, [*short, 50 + turn], 400, arrivals))
        stream.start()
        while len(arrivals) < PIECES_BEFORE:
            time.sleep(0.001)
        asked, first = time.perf_counter(), []
        pieces(port, [*long, turn], 1, first)
        stream.join()
        if turn:  # the first is a warm-up
            alone += undisturbed
            firsts.append(first[0] - asked)
            beside += [end - start for start, end in pairwise(arrivals)
                       if end > asked and start < first[0]]  # fmt: skip
    return alone, beside, firsts


def gaps(arrivals: list[float]) -> list[float]:
    """Times between pieces."""
    return [end - start for start, end in pairwise(arrivals)]


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return quantiles(values, n=100, method="inclusive")[98]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print("| prompts are read | pieces | median ms | p99 ms | p99 over p99 alone | first token of the prompt, ms |")
    print("|---|---|---|---|---|---|")
    for name, arguments in (("in chunks", ()), ("whole", ("--additional-config", json.dumps(WHOLE)))):
        process, port = served(asked.artifact, *arguments)
        try:
            alone, beside, firsts = measure(port, asked.tokens, asked.rounds)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if name == "in chunks":
            print(f"| (no prompt arrives) | {len(alone)} | {median(alone) * 1e3:.0f} | {p99(alone) * 1e3:.0f} | 1 | |")
        print(f"| {name} | {len(beside)} | {median(beside) * 1e3:.0f} | {p99(beside) * 1e3:.0f} | "
              f"{p99(beside) / p99(alone):.2f} | {median(firsts) * 1e3:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
