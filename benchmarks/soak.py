"""Mixed load on a served artifact: answers stay right, memory stays put, nothing hangs.

    python benchmarks/soak.py [ARTIFACT] [--minutes 30]

To be run by the environment that has vLLM. The answers to some prompts, alone and greedy, are what every later answer
to them must be; in bfloat16 a batch of one and a larger one round differently, so a difference is allowed where the
artifact's own logits put the two tokens closer than bfloat16's noise at the median token of its report. Then many
clients at once, in random order: whole answers and streamed ones (compared), sampled ones, disconnects in mid-stream,
prompts that are too long, bad JSON, an unknown model, an unsupported field, and vLLM's own `bench serve` beside them.
Every 20 s the memory of the server's processes is added up. Ends with an error if an answer differs, a status is not
the expected one, a request takes longer than `PATIENCE` seconds, memory grows, or requests are left over.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from serving import MODULE, Server

from pipeline.recipe import load
from pipeline.runtime.open import load as open_artifact
from pipeline.validate.gates.scoring import score
from pipeline.validate.prompts import load_prompts, prompts_path

PATIENCE = 120
CLIENTS = 6
LIMIT = 40
PAUSE = 1.0
"""Mean seconds between a client's requests."""

GROWTH = 1.05
BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
    "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
)


class Load:
    """Clients of one server, and what they saw."""

    def __init__(self, port: int, prompts: list[str]) -> None:
        self.port, self.prompts = port, prompts
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.others: set[tuple[int, str]] = set()
        self.slowest = 0.0
        self.right = [self.whole(prompt) for prompt in prompts]

    def post(self, body: bytes | dict[str, Any], path: str = "/v1/chat/completions") -> tuple[int, bytes]:
        """Status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def body(self, prompt: str, **more: Any) -> dict[str, Any]:
        """A greedy chat request."""
        message = {"role": "user", "content": prompt}
        return {"model": "m", "messages": [message], "max_tokens": LIMIT, "temperature": 0} | more

    def whole(self, prompt: str) -> str:
        """The text of an answer."""
        status, data = self.post(self.body(prompt))
        if status != 200:
            raise RuntimeError(f"{status}: {data[:200]!r}")
        return str(json.loads(data)["choices"][0]["message"]["content"])

    def streamed(self, prompt: str, stop_after: int | None = None) -> str:
        """The text of a streamed answer; after so many events the client goes away."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(self.body(prompt, stream=True)), headers)
        answer, text, events = connection.getresponse(), "", 0
        for line in answer:
            if line.startswith(b"data: {"):
                events += 1
                if stop_after is not None and events > stop_after:
                    break
                choices = json.loads(line[6:])["choices"]
                text += (choices[0]["delta"].get("content") or "") if choices else ""
        connection.close()
        return text

    def same(self, number: int, text: str) -> None:
        """Note an answer that is not what it was."""
        if text != self.right[number]:
            self.others.add((number, text))

    def refused(self, what: str, expected: int, body: bytes | dict[str, Any]) -> None:
        """Note a status that is not the expected one."""
        status, data = self.post(body)
        if status != expected:
            self.faults.append(f"{what}: {status}, expected {expected}: {data[:200]!r}")

    def one(self, chance: random.Random) -> None:
        """One request of some kind."""
        number = chance.randrange(len(self.prompts))
        prompt = self.prompts[number]
        kinds: dict[str, Callable[[], Any]] = {
            "whole": lambda: self.same(number, self.whole(prompt)),
            "streamed": lambda: self.same(number, self.streamed(prompt)),
            "sampled": lambda: self.refused("sampled", 200, self.body(prompt, temperature=0.9, seed=number)),
            "disconnected": lambda: self.streamed(prompt, stop_after=chance.randrange(1, 12)),
            "too long": lambda: self.refused("too long", 400, self.body("word " * 4000)),
            "bad JSON": lambda: self.refused("bad JSON", 400, b'{"model": "m", "messages": ['),
            "unknown model": lambda: self.refused("unknown model", 404, self.body(prompt) | {"model": "other"}),
            "unsupported": lambda: self.refused("unsupported", 400, self.body(prompt, logit_bias={"5": 1.0})),
        }
        kind = chance.choices(list(kinds), [6, 6, 3, 3, 1, 1, 1, 1])[0]
        started = time.monotonic()
        try:
            kinds[kind]()
        except Exception as error:
            self.faults.append(f"{kind}: {error!r}")
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.counts[kind] += 1

    def left_over(self) -> float:
        """Requests that the server still has."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        return sum(float(v) for v in re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", text, re.M))


def memory(leader: int) -> int:
    """Resident bytes of all processes of a group, shared pages shared out."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(folder.name)) == leader:
                found = re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(encoding="utf-8"), re.M)
                total += int(found[1]) * 1024 if found else 0
    return total


def bench_serve(port: int, tokenizer: Path, count: int) -> subprocess.Popen[bytes]:
    """vLLM's own load generator."""
    options = {"base-url": f"http://127.0.0.1:{port}", "model": "m", "served-model-name": "m", "dataset-name": "random",
               "random-input-len": 48, "random-output-len": 32, "num-prompts": count, "request-rate": 1,
               "tokenizer": tokenizer, "endpoint": "/v1/completions"}  # fmt: skip
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        BENCH,
        *(str(p) for k, v in options.items() for p in (f"--{k}", v)),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def watch(load: Load, server: Server, tokenizer: Path, seconds: float) -> tuple[list[int], list[str]]:
    """Run all clients for so long; returns memory over time and what `bench serve` said."""
    ends, sizes, said = time.monotonic() + seconds, [], []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < ends and server.process.poll() is None:
            load.one(chance)
            time.sleep(chance.expovariate(1 / PAUSE))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    bench = bench_serve(server.port, tokenizer, 40)
    while time.monotonic() < ends:
        time.sleep(20)
        sizes.append(memory(server.process.pid))
        done = sum(load.counts.values())
        print(f"{done} requests, {len(load.faults)} faults, {sizes[-1] / 1e6:.0f} MB, slowest {load.slowest:.0f} s, "
              f"{(ends - time.monotonic()) / 60:.0f} min left", flush=True)  # fmt: skip
        if bench.poll() is not None and ends - time.monotonic() > 120:
            said.append(bench.communicate()[0].decode())
            bench = bench_serve(server.port, tokenizer, 40)
    for thread in threads:
        thread.join()
    said.append(bench.communicate()[0].decode())
    return sizes, said


def judged(root: Path, load: Load) -> list[str]:
    """Answers that differ from the first ones by more than a near-tie, by the logits after what they share."""
    report = json.loads((root / "reports" / "parity.json").read_text(encoding="utf-8"))
    noise = median(report["parity"]["target"]["points"]["noise"])  # relative to the largest logit
    engine = open_artifact(root)
    spec = next(g for g in engine.graphs if g.phase == "score" and g.model == "target")
    faults = []
    for number, text in sorted(load.others):
        ours, first = (engine.text.encode(t, special=False) for t in (text, load.right[number]))
        shared = next((i for i, (a, b) in enumerate(zip(ours, first, strict=False)) if a != b), None)
        if shared is None:
            faults.append(f"prompt {number}: {text!r} is cut short")
            continue
        tokens = [*engine.text.chat(load.prompts[number]), *first[:shared]]
        logits = score(engine, spec, [tokens])[0][-1]
        tolerance = noise * float(logits.max())
        gap = float((logits[first[shared]] - logits[ours[shared]]).abs())
        print(f"prompt {number}, token {shared}: gap {gap:.3f}, tolerance {tolerance:.3f}")
        if gap > tolerance:
            faults.append(f"prompt {number}: {text!r} for {load.right[number]!r}, gap {gap:.3f}")
    return faults


def main() -> None:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--minutes", type=float, default=30)
    asked = parser.parse_args()
    recipe = load(asked.artifact / "recipe.yaml")
    shipped = load_prompts(prompts_path(recipe.validate_.prompts, Path("recipes")))
    with tempfile.TemporaryDirectory() as work:
        server = Server([*MODULE, "--model", str(asked.artifact)], Path(work) / "log")
        try:
            server.first_token(shipped[0].text)
            load_ = Load(server.port, [prompt.text for prompt in shipped[::4]])
            sizes, said = watch(load_, server, asked.artifact / "tokenizer", asked.minutes * 60)
            time.sleep(2)
            load_.same(0, load_.whole(load_.prompts[0]))
            left = load_.left_over()
        finally:
            server.end()
    load_.faults += judged(asked.artifact, load_)
    third = max(len(sizes) // 3, 1)
    early, late = median(sizes[1 : 1 + third] or sizes), median(sizes[-third:])
    completed = [re.search(r"Successful requests:\s+(\d+)", text) for text in said]
    print(f"requests by kind: {dict(load_.counts)}; slowest {load_.slowest:.1f} s")
    print(f"memory: {early / 1e6:.0f} MB early, {late / 1e6:.0f} MB late, {late / early:.3f}; left over: {left:.0f}")
    print(f"bench serve: {len(said)} runs, completed {[int(m[1]) if m else 0 for m in completed]} of 40 each")
    for fault in load_.faults[:10]:
        print(f"fault: {fault}")
    failed = [text[-1500:] for text, m in zip(said, completed, strict=True) if not m or int(m[1]) != 40]
    print(*failed[:1], sep="\n")
    if load_.faults or failed or left or late > GROWTH * early or load_.slowest > PATIENCE:
        raise SystemExit("not clean")
    print("clean")


if __name__ == "__main__":
    main()
