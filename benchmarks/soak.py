"""Mixed load on a served artifact: answers stay right, memory stays put, nothing hangs.

    python benchmarks/soak.py [ARTIFACT] [--minutes 60] [--chaos SEED]

To be run by the environment that has vLLM. The engine's greedy answers to some prompts, without a server, are what
every answer to them must be; in bfloat16 a batch of one and a larger one round differently, so a difference is allowed
where the artifact's own logits put the two tokens closer than bfloat16's noise at the median token of its report. Many
clients at once, in random order: whole answers and streamed ones (compared), long prompts, sampled ones, JSON by a
schema, log probabilities, disconnects in mid-stream, prompts that are too long, bad JSON, an unknown model, an
unsupported field, and vLLM's own `bench serve` beside them. With `--chaos` the server is disturbed meanwhile
(`soak_chaos.py`): an engine and the server are killed once, processes stand still for 20 s, the temporary folder is
full, the registry is away.

Every 20 s the memory, descriptors, threads and temporary files of the server's processes are counted. Ends with an
error if an answer differs, a status is not the expected one (but while a killed server starts), a request takes longer
than `PATIENCE` seconds, memory at the end is more than 2% over that of minute 10, or anything is left over.
"""

from __future__ import annotations

import argparse
import http.client
import json
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

import soak_chaos
from soak_chaos import Served, Use

from pipeline.recipe import load
from pipeline.runtime.open import load as open_artifact
from pipeline.validate.gates.scoring import score
from pipeline.validate.prompts import load_prompts, prompts_path

PATIENCE = 120
CLIENTS = 6
LIMIT = 40
LONG_CHARACTERS = 2500
"""Of the prompt that is read in several chunks."""
PAUSE = 1.0
"""Mean seconds between a client's requests."""

GROWTH = 1.02
WARM_S = 600.0
"""Memory and descriptors are compared with those of minute 10, or of the first third of a shorter run."""
REST = 15
"""Counts of memory, the lowest of which is compared: `bench serve` raises it for two minutes."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
    "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
)


class Seen(threading.local):
    """What a client's request of this moment saw: it counts if there was a server all the time."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.others: list[tuple[int, str]] = []


class Load:
    """Clients of one server, and what they saw."""

    def __init__(self, port: int, right: dict[str, str], served: Served | None = None) -> None:
        self.port, self.served = port, served
        self.prompts, self.right = list(right), list(right.values())
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.others: set[tuple[int, str]] = set()
        self.slowest = 0.0
        self.without_server = 0
        self.seen = Seen()

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
        """Note an answer that is not the right one."""
        if text != self.right[number]:
            self.seen.others.append((number, text))

    def refused(self, what: str, expected: int, body: bytes | dict[str, Any]) -> None:
        """Note a status that is not the expected one."""
        status, data = self.post(body)
        if status != expected:
            self.seen.faults.append(f"{what}: {status}, expected {expected}: {data[:200]!r}")

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
            "unsupported": lambda: self.refused("unsupported", 400, self.shown(prompt)),
            "schema": lambda: self.json(prompt),
            "log probabilities": lambda: self.refused(
                "log probabilities", 200, self.body(prompt, logprobs=True, top_logprobs=2)
            ),
        }
        kind = chance.choices(list(kinds), [6, 6, 3, 3, 1, 1, 1, 1, 2, 2])[0]
        self.seen.faults, self.seen.others, started = [], [], time.monotonic()
        try:
            kinds[kind]()
        except Exception as error:
            self.seen.faults.append(f"{kind}: {error!r}")
        if self.served is not None and self.served.may_fail(started, time.monotonic()):
            self.without_server += 1
        else:
            self.faults += self.seen.faults
            self.others |= set(self.seen.others)
            self.slowest = max(self.slowest, time.monotonic() - started)
        self.counts[kind] += 1

    def shown(self, prompt: str) -> dict[str, Any]:
        """A request with an image."""
        return self.body(prompt) | {
            "messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": prompt}]}]
        }

    def json(self, prompt: str) -> None:
        """A request whose answer must follow a schema."""
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
        status, data = self.post(self.body(f"{prompt}\nAnswer as JSON.", response_format=schema))
        if status != 200:
            self.seen.faults.append(f"schema: {status}, {data[:200]!r}")
            return
        answer = json.loads(data)["choices"][0]
        text = answer["message"]["content"]
        if answer["finish_reason"] != "length" and not isinstance(json.loads(text)["a"], int):
            self.seen.faults.append(f"schema: {text!r}")

    def left_over(self) -> float:
        """Requests that the server still has."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        return sum(float(v) for v in re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", text, re.M))


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


def watch(load: Load, served: Served, tokenizer: Path, ends: float) -> tuple[list[Use], list[str]]:
    """Run all clients until a moment; returns what the server held over time, and what `bench serve` said."""
    uses, said = list[Use](), list[str]()

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < ends:
            load.one(chance)
            time.sleep(chance.expovariate(1 / PAUSE))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    bench, began = bench_serve(load.port, tokenizer, 40), time.monotonic()
    while time.monotonic() < ends:
        time.sleep(20)
        uses.append(served.use())
        print(f"{sum(load.counts.values())} requests, {len(load.faults)} faults, {uses[-1]}, "
              f"slowest {load.slowest:.0f} s, {(ends - time.monotonic()) / 60:.0f} min left", flush=True)  # fmt: skip
        if bench.poll() is not None and ends - time.monotonic() > 120:
            note(served, said, bench, began)
            bench, began = bench_serve(load.port, tokenizer, 40), time.monotonic()
    for thread in threads:
        thread.join()
    note(served, said, bench, began)
    return uses, said


def note(served: Served, said: list[str], bench: subprocess.Popen[bytes], began: float) -> None:
    """Keep what `bench serve` said, unless there was no server for a while."""
    text = bench.communicate()[0].decode()
    if not served.may_fail(began, time.monotonic()):
        said.append(text)


def answers(root: Path, prompts: list[str]) -> dict[str, str]:
    """The engine's greedy answers, without a server."""
    with open_artifact(root) as engine:
        found = engine.generate([engine.text.chat(prompt) for prompt in prompts], max_new_tokens=LIMIT, temperature=0)
        return {prompt: each.text for prompt, each in zip(prompts, found, strict=True)}


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


def grown(uses: list[Use], since: int) -> list[str]:
    """What the server holds more of at the end than at one of its counts."""
    rest = min(REST, len(uses) // 4 + 1)
    first, last = uses[since : since + rest] or uses[-1:], uses[-rest:]
    size, end = (min(use.size_bytes for use in part) for part in (first, last))
    print(
        f"memory: {size / 1e6:.0f} MB at minute {(since + 1) / 3:.0f}, {end / 1e6:.0f} MB at the end, {end / size:.3f}"
    )
    print(f"descriptors, threads, temporary files: {first[0]}, at the end {last[-1]}")
    faults = [f"memory grew: {end / size:.3f}"] if end > GROWTH * size else []
    held: dict[str, Callable[[Use], int]] = {
        "descriptors": lambda use: use.descriptors, "threads": lambda use: use.threads, "files": lambda use: use.files,
    }  # fmt: skip
    return faults + [
        f"more {name} at the end" for name, of in held.items() if median(map(of, last)) > max(map(of, first))
    ]


def soaked(asked: argparse.Namespace, work: Path) -> tuple[Load, list[str], list[str]]:
    """Serve, load and disturb; returns the clients, faults of the server, and what `bench serve` said."""
    recipe = load(asked.artifact / "recipe.yaml")
    shipped = [prompt.text for prompt in load_prompts(prompts_path(recipe.validate_.prompts, Path("recipes")))]
    right = answers(asked.artifact, [*shipped[::4], " ".join(shipped)[:LONG_CHARACTERS]])
    with soak_chaos.small_temp(work) as has_small_disk:
        served = Served(*soak_chaos.copied_registry(asked.artifact, work), work)
        served.start(shipped[0])
        try:
            ends = time.monotonic() + asked.minutes * 60
            clients, disturbed = Load(served.server.port, right, served), list[str]()
            if asked.chaos is not None:

                def disturb(seed: int = asked.chaos) -> None:
                    disturbed.extend(
                        soak_chaos.disturb(served, seed, ends, shipped[0], has_small_disk=has_small_disk)
                    )  # fmt: skip

                disturber = threading.Thread(target=disturb)
                disturber.start()
            uses, said = watch(clients, served, asked.artifact / "tokenizer", ends)
            if asked.chaos is not None:
                disturber.join()
                print(f"{len(disturbed)} disturbances, temporary folder {'small' if has_small_disk else 'never full'}")
            time.sleep(2)
            clients.same(0, clients.whole(clients.prompts[0]))
            clients.others |= set(clients.seen.others)
            faults = grown(uses, min(int(WARM_S / 20), len(uses) // 3))
            if left := clients.left_over():
                faults.append(f"{left:.0f} requests left over")
        finally:
            served.server.end()
        time.sleep(2)
        if served.outlived:
            faults.append(f"{served.outlived} processes outlived a killed one of their server")
        if survivors := served.processes():
            faults.append(f"{len(survivors)} processes outlived the server")
        if left_files := [path.name for path in (work / "tmp").rglob("*") if path.is_file()]:
            faults.append(f"temporary files left: {left_files[:5]}")
    if asked.chaos is not None and not disturbed:
        faults.append("nothing was disturbed")
    return clients, faults, said


def main() -> None:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--chaos", type=int, metavar="SEED", help="disturb the server; the seed decides how")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        clients, faults, said = soaked(asked, Path(work))
    faults += clients.faults + judged(asked.artifact, clients)
    completed = [re.search(r"Successful requests:\s+(\d+)", text) for text in said]
    print(f"requests by kind: {dict(clients.counts)}; slowest {clients.slowest:.1f} s; "
          f"{clients.without_server} while there was no server")  # fmt: skip
    print(f"bench serve: {len(said)} runs, completed {[int(m[1]) if m else 0 for m in completed]} of 40 each")
    failed = [text[-1500:] for text, m in zip(said, completed, strict=True) if not m or int(m[1]) != 40]
    print(*failed[:1], sep="\n")
    if clients.slowest > PATIENCE:
        faults.append(f"a request took {clients.slowest:.0f} s")
    for fault in faults[:10]:
        print(f"fault: {fault}")
    if faults or failed:
        raise SystemExit("not clean")
    print("clean")


if __name__ == "__main__":
    main()
