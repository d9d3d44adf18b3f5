"""All gates in one pass over an artifact: what runs, in which order, on which graphs. Judges nothing itself.

The order saves work: the probes that parity scores leave the caches full to the end of a bucket, which is where
losslessness and the distribution are then tested.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.local import Cache
from pipeline.graphs.spec import GraphSpec
from pipeline.models.weights import D2T, EMBEDDING
from pipeline.progress import Log
from pipeline.recipe.schema import Recipe
from pipeline.runtime.engine import Engine, Generation
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.gates import acceptance, distribution, losslessness, parity
from pipeline.validate.gates.limits import FLIP_LIMIT, TIE
from pipeline.validate.gates.losslessness import Lossless
from pipeline.validate.gates.parity import Parity, Sequence_
from pipeline.validate.gates.rounding import rounding
from pipeline.validate.prompts import Prompt
from pipeline.validate.reference.goldens import Golden, Goldens

PLAIN_PROMPTS = 16
"""Prompts that plain decode answers, too. The answers to all are compared with the reference, token by token."""

SPREAD = 8
"""Prompts that are scored again in each further KV bucket, beside the probes."""


@dataclass
class Findings:
    """What the gates found: failures by gate, data for the report by section, seconds by stage."""

    gates: dict[str, list[str]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True when no gate found anything."""
        return not any(self.gates.values())


@dataclass
class Gates:
    """One run of all gates."""

    engine: Engine
    recipe: Recipe
    prompts: list[Prompt]
    pair: tuple[Checkpoint, Checkpoint]
    cache: Cache
    log: Log
    found: Findings = field(default_factory=Findings)

    def run(self) -> Findings:
        """Run every gate; failures are findings, not errors."""
        self.encoded = self._encode()
        self.speculative: dict[int, list[Generation]] = {}
        for steps in self.recipe.speculation.draft_tokens:
            with self._stage(f"speculation with K={steps}"):
                self.speculative[steps] = self._generate(self.encoded, steps)
        self.plainly = range(0, len(self.prompts), max(len(self.prompts) // PLAIN_PROMPTS, 1))
        with self._stage(f"plain decode of {len(self.plainly)} prompts"):
            self.plain = self._generate([self.encoded[i] for i in self.plainly], None)
        self._sequences()
        with self._stage("reference"):
            self._references()
        self._parity_and_edges()
        self._acceptance()
        return self.found

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.log(f"  {name}")
        started = time.monotonic()
        yield
        self.found.seconds[name] = self.found.seconds.get(name, 0.0) + time.monotonic() - started

    def _encode(self) -> list[list[int]]:
        """Prompts as tokens, the end of those that no prefill graph holds."""
        text, longest = self.engine.text, self.engine.manifest.shapes.prefill[-1]
        encoded = [text.chat(p.text) if text.has_chat else text.encode(p.text) for p in self.prompts]
        self.found.data["cut_prompts"] = [
            p.id for p, tokens in zip(self.prompts, encoded, strict=True) if len(tokens) > longest
        ]
        return [tokens[-longest:] for tokens in encoded]

    def _generate(self, encoded: list[list[int]], steps: int | None) -> list[Generation]:
        limit = self.recipe.validate_.max_new_tokens
        shown = _Progress(self.log, len(encoded), limit)
        return self.engine.generate(
            encoded, max_new_tokens=limit, speculate=steps is not None, draft_tokens=steps, on_tokens=shown
        )

    def _sequences(self) -> None:
        """Prompts with their answers, and probes: the same tokens end to end, rotated, as long as the cache."""
        answers = self.speculative[self.recipe.speculation.draft_tokens[0]]
        texts = [[*prompt, *answer.tokens] for prompt, answer in zip(self.encoded, answers, strict=True)]
        self.sequences = [
            Sequence_(p.id, p.kind, tokens, len(prompt))
            for p, tokens, prompt in zip(self.prompts, texts, self.encoded, strict=True)
        ]
        rows, length = self.engine.rows, self.engine.length
        self.probes = []
        for row in range(rows):
            first = row * len(texts) // rows
            tokens = list(islice(cycle(t for text in texts[first:] + texts[:first] for t in text), length))
            self.probes.append(Sequence_(f"probe-{row + 1}", "probe", tokens, length))

    def _references(self) -> None:
        """Goldens of both models, by sequence name."""
        self.goldens: dict[str, dict[str, Golden]] = {}
        self.roundings: dict[str, dict[str, Any]] = {}
        counts = {}
        everything = [*self.sequences, *self.probes]
        for model, checkpoint in zip(("target", "draft"), self.pair, strict=True):
            narrow = self.recipe.draft_weights if model == "draft" else self.recipe.target.weights
            stored = narrow, self.recipe.target.weights
            source = Goldens(checkpoint, self.pair[0], self._dtype(model), self.cache, self.log, *stored)
            goldens = source.of([sequence.tokens for sequence in everything])
            self.goldens[model] = {s.name: g for s, g in zip(everything, goldens, strict=True)}
            counts[model] = {"computed": source.computed, "cached": source.found}
            if narrow is not None:
                plain = replace(source, narrow=None, target_narrow=None, _known={})
                whole = plain.of([sequence.tokens for sequence in self.sequences])
                self.roundings[model] = rounding(goldens[: len(whole)], whole)
        self.found.data["goldens"] = counts

    def _dtype(self, model: str) -> str:
        return self.recipe.draft.dtype or self.recipe.target.dtype if model == "draft" else self.recipe.target.dtype

    def _parity_and_edges(self) -> None:
        figures = {model: Parity(model, self._dtype(model)) for model in ("target", "draft")}
        probes = [probe.tokens for probe in self.probes]
        lossless: Lossless | None = None
        drawn: list[distribution.Drawn] = []
        shorter = 0
        for kv in self.engine.manifest.shapes.kv:
            with self._stage("parity"):
                for model, of in figures.items():
                    self._measure(model, kv, of, shorter)
            shorter = kv
            lossless = lossless or self._compare_prompts(TIE * figures["target"].floor)
            known = len(lossless.differences)
            with self._stage("losslessness at bucket edges"):
                losslessness.compare_edges(self.engine, kv, probes, lossless)
            if "stochastic" in self.recipe.speculation.sampling:
                with self._stage("distribution"):
                    if len(lossless.differences) > known:  # judging them used the caches
                        losslessness.fill(self.engine, kv, [p[: min(kv, self.engine.length)] for p in probes])
                    drawn += self._draw(kv, probes, lossless.tie)
        assert lossless is not None
        self._judge(figures, lossless, drawn)

    def _judge(self, figures: dict[str, Parity], lossless: Lossless, drawn: list[distribution.Drawn]) -> None:
        rate = self.recipe.validate_.gates.near_tie_rate
        choices, faults = self._choices(figures["target"].floor)
        self.found.gates["parity"] = [*(f for of in figures.values() for f in parity.failures(of, rate)), *faults]
        self.found.data["parity"] = {
            m: parity.to_json(of, self._index()) | {"rounding": self.roundings.get(m)} for m, of in figures.items()
        }
        self.found.data["choices"] = choices
        self.found.gates["losslessness"] = lossless.failures(rate)
        self.found.data["losslessness"] = lossless.to_json()
        if "stochastic" in self.recipe.speculation.sampling:
            tests, self.found.gates["distribution"] = distribution.judge(drawn)
            self.found.data["distribution"] = distribution.to_json(tests)

    def _index(self) -> dict[str, int]:
        return {sequence.name: index for index, sequence in enumerate([*self.sequences, *self.probes])}

    def _measure(self, model: str, kv: int, of: Parity, shorter: int) -> None:
        """Each prompt in its smallest bucket, some in larger ones; probes in each, last: they stay in the caches."""
        spec = next(g for g in self.engine.graphs if g.phase == "score" and g.model == model and g.kv == kv)
        every = max(len(self.sequences) // SPREAD, 1)
        chosen = [s for i, s in enumerate(self.sequences) if len(s.tokens) > shorter or i % every == 0]
        chosen.sort(key=lambda s: len(s.tokens))
        usable = min(kv, self.engine.length)
        for group in (chosen, self.probes[: spec.batch]):
            cut = [Sequence_(s.name, s.kind, s.tokens[:usable], s.prompt) for s in group]
            goldens = [self.goldens[model][s.name].cut(usable) for s in group]
            parity.measure(self.engine, spec, cut, goldens, of, self.log)

    def _compare_prompts(self, tie: float) -> Lossless:
        """The first K against plain decode, where that ran; every other K against the first, on all prompts."""
        lossless = Lossless(tie)
        names = [prompt.id for prompt in self.prompts]
        (first, answers), *others = self.speculative.items()
        compare = losslessness.compare_prompts
        some = [names[i] for i in self.plainly], [self.encoded[i] for i in self.plainly]
        compare(self.engine, *some, self.plain, [answers[i] for i in self.plainly], f"K={first}", lossless)
        for steps, more in others:
            compare(self.engine, names, self.encoded, answers, more, f"K={steps}", lossless)
        if lossless.differences:  # judging them used the caches, which the edges need full
            first = self.engine.manifest.shapes.kv[0]
            usable = min(first, self.engine.length)
            losslessness.fill(self.engine, first, [probe.tokens[:usable] for probe in self.probes])
        return lossless

    def _draw(self, kv: int, probes: Sequence[list[int]], tie: float) -> Iterator[distribution.Drawn]:
        ids = self._draft_ids()
        for spec in self.engine.graphs:
            if (spec.kv, spec.sampling) == (kv, "stochastic") and spec.phase in ("decode", "speculate"):
                self.log(f"    {spec.name}")
                yield distribution.draw(self.engine, spec, probes, ids, tie)

    def _draft_ids(self) -> Tensor | None:
        from pipeline.sources.weights import weights
        from pipeline.validate.reference.goldens import read_tensor

        draft = self.pair[1]
        if draft.config.draft_vocab is None:
            return None
        return torch.arange(draft.config.draft_vocab) + read_tensor(weights(draft)[D2T]).long()

    def _choices(self, floor: float) -> tuple[dict[str, int], list[str]]:
        """Tokens of the answers and of the prefill graphs against the baseline's own choice after the same tokens."""
        counts = {"tokens": 0, "near_ties": 0, "flips_of_noise": 0}
        failures: list[str] = []
        for sequence in self.sequences:
            golden = self.goldens["target"][sequence.name]
            for at in range(sequence.prompt, len(sequence.tokens)):
                self._choice(
                    counts, failures, golden, at - 1, sequence.tokens[at], f"the answer to {sequence.name}", floor
                )
        with self._stage("prefill graphs"):
            for spec in (g for g in self.engine.graphs if g.phase == "prefill"):
                self._prefill(spec, counts, failures, floor)
        allowed = self.recipe.validate_.gates.near_tie_rate * counts["tokens"] + FLIP_LIMIT * counts["flips_of_noise"]
        if counts["near_ties"] > allowed:
            failures.append(
                f"near-ties {counts['near_ties']} of {counts['tokens']} tokens; at most {allowed:.0f} are usual"
            )
        return counts, failures[:5]

    def _choice(
        self, counts: dict[str, int], failures: list[str], golden: Golden, at: int, token: int, what: str, floor: float
    ) -> None:
        counts["tokens"] += 1
        gap = parity.gap_of(golden, at, token)
        if gap > TIE * max(parity.noise_at(golden, at), floor):
            failures.append(f"{what}: token {token} at position {at + 1} is not the baseline's, gap {gap:.1e}")
        counts["near_ties"] += gap > 0
        counts["flips_of_noise"] += int(golden.noise.best[at] != golden.baseline.best[at])

    def _prefill(self, spec: GraphSpec, counts: dict[str, int], failures: list[str], floor: float) -> None:
        """Prefill ragged probes, the full bucket and a single token among them, then decode one token after each."""
        rows = min(spec.batch, len(self.probes))
        longest = min(spec.tokens, self.engine.length - 1)
        lengths = [max(longest - 3 * row, 1) for row in range(rows)]
        if rows > 1:
            lengths[-1] = 1
        slots = list(reversed(range(rows)))
        tokens = torch.zeros(spec.batch, spec.tokens, dtype=torch.int32)
        for row, length in enumerate(lengths):
            tokens[row, :length] = torch.tensor(self.probes[row].tokens[:length])
        arguments = {"tokens": tokens, "lengths": torch.tensor(lengths, dtype=torch.int32),
                     "slots": torch.tensor(slots, dtype=torch.int32)}  # fmt: skip
        if spec.sampling == "stochastic":
            arguments |= losslessness.settings(spec.batch, 0.0, 0, 1.0) | {"uniforms": torch.zeros(spec.batch, 1)}
        first = self.engine.ranks.run(spec, arguments)["token"]
        decode = min((g for g in self.engine.graphs if g.phase == "decode" and g.batch >= rows and g.kv > longest),
                     key=lambda g: (g.batch, g.kv))  # fmt: skip
        places = sorted(range(rows), key=lambda row: slots[row])
        after = [losslessness.Row(self.probes[row].tokens[: lengths[row] + 1], 0) for row in places]
        spare = [losslessness.Row([0], 0)] * (decode.batch - rows)
        second = losslessness.step(self.engine, decode, [*after, *spare], [True] * rows + [False] * len(spare))
        for row, length in enumerate(lengths):
            golden = self.goldens["target"][self.probes[row].name]
            self._choice(counts, failures, golden, length - 1, int(first[row]), f"{spec.name}, row {row}", floor)
            token = second[places.index(row)][0]
            self._choice(counts, failures, golden, length, token, f"{decode.name} after {spec.name}, row {row}", floor)

    def _acceptance(self) -> None:
        figures = [acceptance.acceptance(self.prompts, a, steps) for steps, a in self.speculative.items()]
        floor = self.recipe.validate_.gates.tokens_per_step
        self.found.gates["acceptance"] = [
            f"K={f['draft_tokens']}: {f['tokens_per_step']:.2f} tokens per step is below the floor {floor}"
            for f in figures
            if f["tokens_per_step"] < floor
        ]
        self.found.data["acceptance"] = figures
        with self._stage("speed"):
            self.found.data["speed"] = self._speed(figures[0])

    def _speed(self, figures: dict[str, Any]) -> dict[str, Any]:
        chosen = list(range(0, len(self.prompts), max(len(self.prompts) // acceptance.SPEED_PROMPTS, 1)))
        chosen = chosen[: acceptance.SPEED_PROMPTS]
        limit = min(acceptance.SPEED_TOKENS, self.recipe.validate_.max_new_tokens)
        found = acceptance.speed(
            self.engine, [self.encoded[i] for i in chosen], [self.prompts[i].id for i in chosen],
            figures["draft_tokens"], limit,
        )  # fmt: skip
        cost = _bytes_read(self.pair[1]) / _bytes_read(self.pair[0])
        price = self.recipe.validate_.price_per_hour
        per_million = {
            how: price / 3600 / rate * 1e6 if price is not None and (rate := found[how]["tokens_per_s"]) else None
            for how in ("plain", "speculative")
        }
        expected = acceptance.expected_speedup(figures["accepted_given_previous"], cost)
        return found | {"draft_cost": cost, "expected_speedup": expected, "cost_per_million_tokens": per_million}


@dataclass
class _Progress:
    """Shows how many tokens of a generation have come, about every tenth."""

    log: Log
    prompts: int
    tokens: int
    came: int = 0
    shown: int = 0

    def __call__(self, index: int, new: list[int]) -> None:  # noqa: ARG002 - the engine's callback
        self.came += len(new)
        share = 10 * self.came // (self.prompts * self.tokens)
        if share > self.shown:
            self.shown = share
            self.log(f"    {self.came} of at most {self.prompts * self.tokens} tokens")


def _bytes_read(checkpoint: Checkpoint) -> int:
    """Weights that one pass of a model reads: layers and head, a row of the embedding at most."""
    from pipeline.models.weights import weight_specs

    config = checkpoint.config
    sizes = {spec.name: torch.Size(spec.shape).numel() for spec in weight_specs(config)}
    embedding = sizes[EMBEDDING]
    return sum(sizes.values()) - (0 if config.tied else embedding)
