"""Choose the values of a recipe for a pair, each with its reason. Pure, apart from the file of traffic. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, RecipeError, SourceError
from pipeline.measure.buckets import KV_MULTIPLE, PREFILL_MULTIPLE
from pipeline.measure.traffic import Room, read_traffic
from pipeline.measure.traffic_buckets import graphs_per_bucket, propose
from pipeline.models.config import ModelConfig
from pipeline.models.draft_kind import DRAFT_KINDS
from pipeline.models.weights import up_to
from pipeline.plan.estimates import GIB
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe import Recipe
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.recipe.chips import CHIPS, ChipName
from pipeline.recipe.schema import Dtype
from pipeline.sources.checkpoint import Checkpoint

CPU_KV, NEURON_KV = 2048, 4096
"""Largest kv bucket of a first recipe, where the models allow it."""

PREFILL_SHARES = (16, 4)
"""Prefill buckets of a first recipe: these parts of the kv bucket."""

LEAST_LENGTH = 4
"""Positions of the shortest cache that holds a prompt and an answer of the gates."""

FILLED = 0.85
"""Part of a core's memory that the plan of a first recipe may fill.

A plan counts weights, caches and what a graph holds at its peak. Compiled programs, buffers of collectives and spills
of the compiler are not in it.
"""

CANDIDATES = 256
ANSWER = 32
"""Tokens of each answer of the gates."""

Values = Mapping[str, Any]
"""Keys of a recipe, with dots between sections and keys."""


@dataclass(frozen=True)
class Chosen:
    """Values of a recipe by dotted key, and the reason of each that has one."""

    values: Values
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Chosen) -> Chosen:
        return Chosen({**self.values, **other.values}, {**self.reasons, **other.reasons})

    @property
    def recipe(self) -> Recipe:
        """The recipe of these values."""
        return Recipe.model_validate(self.sections)

    @property
    def sections(self) -> dict[str, Any]:
        """The values as sections of a recipe file."""
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            section, _, name = key.rpartition(".")
            (found.setdefault(section, {}) if section else found)[name] = value
        return found


@dataclass(frozen=True)
class Pair:
    """The configs of target and draft, and what was chosen of them so far."""

    target: Checkpoint
    draft: ModelConfig
    base: Chosen
    """Name, sources, method, K."""

    @property
    def limit(self) -> int:
        """Length of the longest cache of both models."""
        return min(self.target.config.longest, self.draft.longest)

    def plan(self, chosen: Chosen) -> Plan:
        """Return the plan of a recipe with these values."""
        return make_plan((self.base | chosen).recipe, self.target.config, self.draft)


def choose(pair: Pair, chip: ChipName | None, traffic: Path | None) -> Chosen:
    """Return the values of a recipe: on a Neuron chip, or else on a CPU.

    Raises:
        SourceError: the models are too short for a prompt and an answer.
        RecipeError: no number of ranks fits; the problems of the largest.
        InputError: a file of traffic that cannot be used.

    """
    if pair.limit < LEAST_LENGTH:
        what = f"found models of {pair.limit} positions, expected at least {LEAST_LENGTH}"
        raise SourceError(what, where=str(pair.target.root), fix="check max_position_embeddings in config.json")
    backend, dtype = _backend(chip), _dtype(pair.target, chip)
    sampling, shapes = _sampling(pair, chip), _shapes(pair, chip)
    chosen = pair.base | backend | dtype | sampling | shapes | _gates(pair, shapes)
    if traffic is not None:
        chosen |= _longest(traffic, pair, chosen)
    chosen |= _ranks(pair, chosen, chip)
    return chosen if traffic is None else chosen | _buckets(traffic, pair, chosen)


def _backend(chip: ChipName | None) -> Chosen:
    if chip is None:
        return Chosen({"backend.name": "inductor", "backend.device": "cpu"}, {"backend.name": "this machine's CPU"})
    reason = {"backend.target": f"--target {chip}; its cores in the runtime's default size"}
    return Chosen({"backend.name": "neuron", "backend.target": chip}, reason)


def _dtype(target: Checkpoint, chip: ChipName | None) -> Chosen:
    if chip is not None:
        return Chosen({"target.dtype": "bfloat16"}, {"target.dtype": "the dtype of the chip's matrix unit"})
    stored = target.config_json.get("dtype") or target.config_json.get("torch_dtype")
    if stored in ("float32", "bfloat16", "float16"):
        return Chosen({"target.dtype": stored}, {"target.dtype": "the dtype in config.json"})
    dtype: Dtype = "bfloat16"
    return Chosen({"target.dtype": dtype}, {"target.dtype": "config.json names none; half the bytes of float32"})


def _sampling(pair: Pair, chip: ChipName | None) -> Chosen:
    """Return the graphs of sampling: on a CPU, those that every request can need; on a chip, without shaped ones."""
    key, kinds = "speculation.sampling", ["greedy", "stochastic", "shaped"]
    if chip is None:
        why = "requests with a temperature need stochastic; JSON schemas, penalties and log probabilities shaped"
        return Chosen({key: kinds}, {key: why})
    size = min(CANDIDATES, pair.target.config.vocab, pair.draft.vocab)
    reasons = {
        key: "requests with a temperature need stochastic; add shaped for JSON schemas, penalties, log probabilities",
        "speculation.candidates": "a Neuron graph samples from the most likely tokens",
    }
    return Chosen({key: kinds[:2], "speculation.candidates": size}, reasons)


def _shapes(pair: Pair, chip: ChipName | None) -> Chosen:
    most = CPU_KV if chip is None else NEURON_KV
    kv = min(pair.limit, most)
    parts = {max(kv // share // PREFILL_MULTIPLE, 1) * PREFILL_MULTIPLE for share in PREFILL_SHARES}
    buckets = sorted({min(part, kv - 1) for part in parts})
    batch = [1, 4] if chip is None else [1]
    allowed = f"the models allow {pair.limit:,}"
    return Chosen(
        {"shapes.batch": batch, "shapes.prefill": buckets, "shapes.kv": [kv]},
        {
            "shapes.batch": "rows decoded together; each bucket multiplies the graphs",
            "shapes.prefill": "short and long prompts; longer ones are read in chunks. From a log: --traffic",
            "shapes.kv": f"prompt and answer together; {allowed}",
        },
    )


def _gates(pair: Pair, shapes: Chosen) -> Chosen:
    length, method = min(ANSWER, shapes.values["shapes.kv"][0] // 4), pair.base.values.get("speculation.method")
    kind = DRAFT_KINDS[method or "draft_model"]  # the schema's default
    every = "every draft passes this limit: a step emits at least one token"
    reason = f"{'about what a step costs' if kind.floor > 1 else every}; raise it to what you need"
    values = {"validate.max_new_tokens": length, "validate.gates": {"tokens_per_step": kind.floor}}
    return Chosen(values, {"validate.gates": reason})


def _ranks(pair: Pair, chosen: Chosen, chip: ChipName | None) -> Chosen:
    """Return the smallest number of ranks that divides the models and fits `FILLED` of the memory of a core.

    If none does, the one that fills it least, of those that fit.
    """
    key = "parallel.tensor"
    if chip is None:
        pair.plan(chosen | Chosen({key: 1}))
        return Chosen({key: 1}, {key: "one process; more ranks only spread memory"})
    cores = CHIPS[chip].cores[NeuronSettings(name="neuron", target=chip).lnc]
    failure: RecipeError | None = None
    tight: list[tuple[int, Chosen]] = []
    for placed in _placements(pair, cores.largest_instance):
        try:
            plan = pair.plan(chosen | placed)
        except RecipeError as error:
            failure = error
            continue
        used = f"{plan.memory.total / GIB:.1f} of {cores.memory_bytes / GIB:.0f} GiB on each"
        if plan.memory.total <= FILLED * cores.memory_bytes:
            reason = f"the smallest number that divides the models and leaves {1 - FILLED:.0%} of a core: {used}"
            return replace(placed, reasons={**placed.reasons, key: reason})
        reason = f"fills a core least of the numbers that divide the models; programs and buffers come on top: {used}"
        tight.append((plan.memory.total, replace(placed, reasons={**placed.reasons, key: reason})))
    if tight:
        return min(tight, key=lambda one: one[0])[1]
    assert failure is not None
    raise failure


def _placements(pair: Pair, cores: int) -> Iterator[Chosen]:
    """Yield numbers of ranks, each with a draft that is split, where its kind allows that, and with a whole one."""
    for ranks in range(1, cores + 1):
        values = {"parallel.tensor": ranks}
        if ranks > 1 and not pair.draft.draft_kind.reads_target_states and pair.draft.draft_vocab is None:
            reason = {"draft.placement": "split like the target: each rank reads a part of the draft"}
            yield Chosen({"draft.placement": "sharded", **values}, reason)
        yield Chosen({"draft.placement": "replicated", **values}, {"draft.placement": "whole on each rank"})


def _longest(traffic: Path, pair: Pair, chosen: Chosen) -> Chosen:
    """Return the largest buckets that the requests of a file need."""
    found = read_traffic(traffic, Room(pair.limit, pair.limit))
    prompts = max(prompt for prompt, _ in found.requests)
    both = max(prompt + answer for prompt, answer in found.requests)
    least = max(chosen.values["validate.max_new_tokens"] + 1, chosen.values["speculation.draft_tokens"][-1] + 2)
    kv = min(max(up_to(both + 1, KV_MULTIPLE), least), pair.limit)
    return Chosen({"shapes.prefill": [min(up_to(prompts, PREFILL_MULTIPLE), kv - 1)], "shapes.kv": [kv]})


def _buckets(traffic: Path, pair: Pair, chosen: Chosen) -> Chosen:
    """Return the buckets that pad the requests of a file least: as many graphs as two buckets of each kind have."""
    plan = pair.plan(chosen)
    found = read_traffic(traffic, Room(chosen.values["shapes.kv"][-1], pair.limit))
    try:
        best = propose(plan, found, 2 * sum(graphs_per_bucket(plan)))
    except InputError as error:
        raise InputError(error.what, where=str(traffic), fix=error.fix) from error
    reasons = {
        f"shapes.{kind}": f"pads the {best.requests:,} requests of {traffic.name} least with this number of graphs"
        for kind in best.proposed
    }
    return Chosen({f"shapes.{kind}": list(of.buckets) for kind, of in best.proposed.items()}, reasons)
