"""What rules cost: steps of each kind in turns, and JSON of a schema with and without drafts.

    PYTHONPATH=. python benchmarks/rules.py [ARTIFACT] [--position 200]

For each batch: medians of a decode step, of a fused step, and of `propose` and `verify`, which rows with rules take
instead; with and without Python's part in arguments and results. Then tokens per second of answers by a JSON schema,
with the largest K, without drafts, and without the schema.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pipeline.graphs.arguments import GREEDY, StepRow, step_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.graphs.verify_arguments import VerifyRow, verify_arguments
from pipeline.measure.tune import full_step
from pipeline.runtime.batch import Drafts, Row, Rows
from pipeline.runtime.engine import Engine
from pipeline.runtime.open import load
from pipeline.runtime.rules import NO_RULES, Rules, RuleState

TURNS, STEPS = 6, 6
NAME = {"type": "string", "maxLength": 20}
SCHEMA = json.dumps({
    "type": "object", "additionalProperties": False, "required": ["city", "country", "population", "rivers"],
    "properties": {
        "city": NAME, "country": NAME, "population": {"type": "integer"},
        "rivers": {"type": "array", "maxItems": 3, "items": NAME},
    },
    "x-guidance": {"whitespace_flexible": False},
})  # fmt: skip
PROMPTS = [f"Describe {city} as JSON." for city in ("Paris", "Cairo", "Lima", "Tokyo", "Oslo", "Delhi", "Rome", "Bonn")]
NEW_TOKENS = 64


def steps_of(engine: Engine, batch: int, position: int) -> dict[str, Callable[[], object]]:
    """Return one step of each kind, with all rows of a batch at a position."""
    most, vocab = engine.manifest.draft_tokens[-1], engine.manifest.vocab
    graphs = {(g.phase, g.sampling, g.draft_tokens): g for g in engine.graphs if g.batch == batch}
    rules = RuleState(Rules(presence_penalty=0.5, logprobs=5), [1, 2, 3], vocab, engine.manifest.eos_ids)
    prompt = [(7 * n) % vocab for n in range(position + 1)]
    rows = {slot: Row(list(prompt), position, 0, GREEDY, rules, in_draft=position) for slot in range(batch)}
    verify, propose = graphs["verify", "shaped", most], graphs["propose", "stochastic", most]
    given = verify_arguments(verify, dict.fromkeys(range(batch), VerifyRow(prompt[-1], position, [3] * most)), vocab)
    proposing = step_arguments(propose, dict.fromkeys(range(batch), StepRow(prompt[-1], position)))

    def whole() -> None:
        _again(rows, position)
        drafts = engine.batch.propose(rows, most)
        engine.batch.verify(rows, {slot: Drafts(of) for slot, of in drafts.items()})

    return {
        "decode": _graph(engine, graphs["decode", "greedy", 0], position),
        "fused": _graph(engine, graphs["speculate", "greedy", most], position),
        "propose": lambda: engine.ranks.run(propose, proposing),
        "verify": lambda: engine.ranks.run(verify, given),
        "propose and verify, with rules": whole,
    }


def _graph(engine: Engine, graph: GraphSpec, position: int) -> Callable[[], object]:
    given = full_step(engine, graph, position)
    return lambda: engine.ranks.run(graph, given)


def _again(rows: Rows, position: int) -> None:
    for row in rows.values():
        row.in_draft, row.proposed = position, []


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--position", type=int, default=200)
    asked = parser.parse_args()
    engine = load(asked.artifact, share_prefixes=False)
    for number, batch in enumerate(engine.manifest.shapes.batch):
        steps = steps_of(engine, batch, asked.position)
        took: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(TURNS + 1):
            for name, run in steps.items():
                for _ in range(STEPS):
                    started = time.perf_counter()
                    run()
                    if turn:
                        took[name].append(time.perf_counter() - started)
        typical = {name: median(of) for name, of in took.items()}
        if number == 0:
            print("| in decode steps | " + " | ".join(typical) + " |\n|" + " --- |" * (len(typical) + 1))
        cells = [f"{of / typical['decode']:.2f}" for of in typical.values()]
        print(f"| batch {batch} ({typical['decode'] * 1e3:.1f} ms) | " + " | ".join(cells) + " |")
    prompts = [engine.text.encode_prompt(text) for text in PROMPTS]
    ways = {
        "schema, drafts": (Rules(json_schema=SCHEMA), True),
        "schema, no drafts": (Rules(json_schema=SCHEMA), False),
        "no schema, drafts": (NO_RULES, True),
        "no schema, no drafts": (NO_RULES, False),
    }
    print("\n| answers | " + " | ".join(ways) + " |\n|" + " --- |" * (len(ways) + 1))
    for at_once in engine.manifest.shapes.batch:
        cells = [_tokens_per_s(engine, prompts, at_once, *way) for way in ways.values()]
        print(f"| {at_once} at once | " + " | ".join(cells) + " |")


def _tokens_per_s(engine: Engine, prompts: list[list[int]], at_once: int, rules: Rules, speculate: bool) -> str:
    """Return tokens per second, and tokens per step."""
    how = {"draft_tokens": engine.manifest.draft_tokens[-1]} if speculate else {"speculate": False}
    started, tokens, steps = time.perf_counter(), 0, 0
    for first in range(0, len(prompts), at_once):
        group = prompts[first : first + at_once]
        answers = engine.generate(group, max_new_tokens=NEW_TOKENS, temperature=0.0, rules=rules, **how)
        tokens += sum(len(answer.tokens) for answer in answers)
        steps += sum(answer.steps for answer in answers)
    rate = f"{tokens / (time.perf_counter() - started):.0f}"
    return f"{rate} ({tokens / steps:.2f} per step)" if steps else rate


if __name__ == "__main__":
    main()
