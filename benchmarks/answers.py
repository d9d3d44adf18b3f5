"""Lookup in earlier answers beside arctic_inference's suffix trees, on the same traces: tokens per step, time per step.

    python benchmarks/answers.py [ARTIFACT] [--traces FILE] [--draft-tokens 4 8]

Traces are greedy answers of an artifact to a traffic of tasks: ten templates, each with six fillings, in random
order; with `--traces` they are kept and read again. Then each answer is replayed: at each step up to K tokens are
proposed, those that the answer goes on with are accepted, and one more is emitted, as where no model drafts. The trees
are used where `arctic_inference.suffix_decoding` can be imported, with the defaults of their class.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.runtime.answers import EarlierAnswers
from pipeline.runtime.batch import LONGER, common_prefix
from pipeline.runtime.lookup import Lookup

TEMPLATES = (
    "Write a Python function that returns the {} of a list of numbers.",
    "List three facts about {}.",
    "Write a short email that invites a colleague to a meeting about {}.",
    "Give a JSON object with the keys name, kind and size that describes {}.",
    "Explain what {} is to a child, in two sentences.",
    "Write a SQL query that selects the ten largest rows of a table of {}.",
    "Summarise the advantages and disadvantages of {}.",
    "Write a unit test for a function that computes the {}.",
    "Translate into French: the {} is on the table.",
    "Write a shell command that counts the lines about {} in a file.",
)
FILLINGS = ("median", "maximum", "variance", "product", "range", "order")
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Trace:
    """The tokens of a prompt and of its answer."""

    prompt: list[int]
    answer: list[int]


class Proposer(Protocol):
    """Proposes tokens for one request after the other."""

    def begin(self, prompt: list[int]) -> None: ...

    def propose(self, tokens: list[int], most: int) -> list[int]: ...

    def emitted(self, tokens: list[int]) -> None: ...

    def end(self, trace: Trace) -> None: ...


class Ours:
    """Prompt lookup of so many tokens, with earlier answers or without."""

    def __init__(self, size: int, remember_tokens: int) -> None:
        self.size = size
        self.answers = EarlierAnswers(remember_tokens, size) if remember_tokens else None

    def begin(self, prompt: list[int]) -> None:  # noqa: ARG002 - a `Proposer`
        self.lookup = Lookup()

    def propose(self, tokens: list[int], most: int) -> list[int]:
        own = self.lookup.find(tokens, self.size, most)
        if self.answers is None:
            return own
        length, earlier = self.answers.find("", tokens, most)
        return earlier if earlier and (not own or length >= LONGER * self.size) else own

    def emitted(self, tokens: list[int]) -> None: ...

    def end(self, trace: Trace) -> None:
        if self.answers is not None:
            self.answers.add("", [*trace.prompt[-self.size :], *trace.answer])


class Trees:
    """The suffix trees of arctic_inference."""

    def __init__(self) -> None:
        from arctic_inference.suffix_decoding.cache import SuffixDecodingCache

        self.cache, self.number = SuffixDecodingCache(max_tree_depth=64), 0

    def begin(self, prompt: list[int]) -> None:
        self.number += 1
        self.cache.start_request(self.number, prompt)

    def propose(self, tokens: list[int], most: int) -> list[int]:
        return list(self.cache.speculate(self.number, tokens[-64:], max_spec_tokens=most).token_ids)

    def emitted(self, tokens: list[int]) -> None:
        self.cache.add_active_response(self.number, tokens)

    def end(self, trace: Trace) -> None:  # noqa: ARG002 - a `Proposer`
        self.cache.stop_request(self.number)


def replay(proposer: Proposer, traces: list[Trace], most: int) -> tuple[float, float]:
    """Tokens per step, and microseconds per step of proposing and keeping."""
    steps = emitted = 0
    spent = 0.0
    for trace in traces:
        tokens, done = list(trace.prompt), 0
        began = time.perf_counter()
        proposer.begin(trace.prompt)
        spent += time.perf_counter() - began
        while done < len(trace.answer):
            began = time.perf_counter()
            proposed = proposer.propose(tokens, most)
            spent += time.perf_counter() - began
            new = trace.answer[done : done + common_prefix(proposed, trace.answer[done:]) + 1]
            tokens += new
            done += len(new)
            began = time.perf_counter()
            proposer.emitted(new)
            spent += time.perf_counter() - began
            steps, emitted = steps + 1, emitted + len(new)
        began = time.perf_counter()
        proposer.end(trace)
        spent += time.perf_counter() - began
    return emitted / steps, 1e6 * spent / steps


def traced(artifact: Path) -> list[Trace]:
    """Greedy answers of an artifact to the traffic."""
    from pipeline.runtime.open import load

    tasks = [template.format(filling) for template in TEMPLATES for filling in FILLINGS]
    random.Random(0).shuffle(tasks)
    with load(artifact) as engine:
        prompts = [engine.text.chat(task) for task in tasks]
        found = engine.generate(prompts, max_new_tokens=ANSWER_TOKENS, temperature=0)
    return [Trace(prompt, each.tokens) for prompt, each in zip(prompts, found, strict=True)]


def main() -> None:
    """Print a row for each proposer and K."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4, 8])
    asked = parser.parse_args()
    if asked.traces and asked.traces.is_file():
        traces = [Trace(**each) for each in json.loads(asked.traces.read_text(encoding="utf-8"))]
    else:
        traces = traced(asked.artifact)
        if asked.traces:
            asked.traces.write_text(json.dumps([vars(trace) for trace in traces]), encoding="utf-8")
    makers: dict[str, Callable[[], Proposer]] = {
        "prompt lookup of 3 tokens": lambda: Ours(3, 0),
        "and 100,000 tokens of earlier answers": lambda: Ours(3, 100_000),
        "and 4,000 tokens of earlier answers": lambda: Ours(3, 4_000),
        "the same with lookup of 1 token": lambda: Ours(1, 100_000),
        "suffix trees of arctic_inference": Trees,
    }
    print(f"{len(traces)} answers, {sum(len(trace.answer) for trace in traces)} tokens")
    for most in asked.draft_tokens:
        for name, make in makers.items():
            try:
                proposer = make()
            except ImportError:
                print(f"K={most}, {name}: not installed")
                continue
            tokens, microseconds = replay(proposer, traces, most)
            print(f"K={most}, {name}: {tokens:.2f} tokens per step, {microseconds:.0f} us per step")


if __name__ == "__main__":
    main()
