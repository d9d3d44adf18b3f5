"""Examine a draft before anything is compiled: its agreement with the target, and whether another reading is better."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pipeline.artifact.host import NATIVE, multiplies
from pipeline.errors import no_string
from pipeline.graphs.dtypes import DTYPES
from pipeline.models import eagle3
from pipeline.models.draft_kind import DraftMethod
from pipeline.models.weights import D2T, EMBEDDING, HEAD, weight_specs
from pipeline.progress import Progress, no_progress
from pipeline.recipe.schema import Recipe
from pipeline.recipe.step_costs import least
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.heads import T2D, verifier_note
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import shared_weights, weights
from pipeline.speculation import block_chains, chains, model_chains
from pipeline.validate.draft.agreement import Agreement, Guesses, agreement
from pipeline.validate.draft.readings import Reading, current, layers_of, others
from pipeline.validate.draft.report import Coverage, DraftReport, Expected, Measured, Verdict
from pipeline.validate.draft.target import TargetStates, answer
from pipeline.validate.prompts import Prompt

LONGEST_PROMPT = 192
"""Tokens of a prompt that are read, its last ones."""

HALF = 0.5
"""Share of a stated acceptance rate below which the statement is wrong, whatever the prompts."""


SCREENED = 0.97
"""Share of the current reading's right first drafts below which another usual reading is measured no further."""

LARGE_GAIN = 1.15
"""Factor of accepted tokens by which an unusual reading must be better: neighbouring layers are similar."""


@dataclass(frozen=True)
class Effort:
    """How much is measured: prompts, tokens of each answer, and places of a step.

    `gain` is the factor of accepted tokens by which another usual reading must be better. With `screens`, a reading
    whose first drafts are right less often than the current ones is not measured at further places.
    """

    prompts: int = 24
    new_tokens: int = 48
    places: int = 4
    gain: float = 1.02
    screens: bool = False

    def prefers(self, reading: Reading, found: Agreement, now: Agreement) -> bool:
        """Return whether a reading is clearly better than the current one, and than chance."""
        return not found.is_chance and found.is_better_than(now, self.gain if reading.is_usual else LARGE_GAIN)


SHORT = Effort(prompts=16, new_tokens=32, places=3, gain=1.05, screens=True)
"""What a build measures before it compiles."""

CHAINS: dict[DraftMethod, Guesses] = {
    "draft_model": model_chains.guesses,
    "eagle3": chains.guesses,
    "p_eagle": chains.guesses,
    "mtp": chains.guesses,
    "dflash": block_chains.guesses,
    "dspark": block_chains.guesses,
}
"""Drafts in a row of each kind of draft."""

Measure = Callable[[int, Reading], Agreement]
Found = list[tuple[Reading, Agreement]]


def usable_dtype(target: Checkpoint, dtype: str, memory_bytes: int) -> str | None:
    """Return the dtype in which half of the memory holds the target: float32, the recipe's, or None.

    The recipe's comes first on a processor that multiplies it: products take half the time of those in float32.
    """
    count = sum(math.prod(spec.shape) for spec in weight_specs(target.config))
    wanted = (dtype, "float32") if dtype in NATIVE and multiplies(dtype) else ("float32", dtype)
    return next((d for d in wanted if count * DTYPES[d].size_bytes <= memory_bytes // 2), None)


def examine(
    recipe: Recipe, pair: tuple[Checkpoint, Checkpoint], prompts: Sequence[list[int]], dtype: str,
    effort: Effort, progress: Progress = no_progress,
) -> DraftReport:  # fmt: skip
    """Return how a draft agrees with its target's greedy answers to prompts, given as tokens.

    `dtype` is that of the target's run (`usable_dtype`).
    """
    no_string(prompts, "prompts", "prompts")
    target, draft = pair
    base = current(draft)
    has_t2d = T2D in weights(draft)
    tried = others(target, draft, has_t2d=has_t2d) if draft.config.eagle3 is not None else []
    layers = layers_of([base, *tried]) if draft.config.eagle3 is not None else ()
    cut = sorted((tokens[-LONGEST_PROMPT:] for tokens in prompts), key=len)  # a group is as long as its longest
    states = answer(target, cut, effort.new_tokens, layers, dtype, progress)
    # A block's answers depend on its number of masks, which is K.
    places = max(recipe.speculation.draft_tokens) if draft.config.draft_kind.blocks else effort.places
    at: Measure = partial(_agreement, pair, _loaded(pair), states)
    now = at(places, base)
    measure = partial(_screened, at, now, places) if effort.screens else partial(at, places)
    found = [(reading, measure(reading)) for reading in tried]
    best = _best(effort, found, now)
    chain = [best] if best is not None else []
    if best is not None:
        further = others(target, replace(draft, config=best[0].config), has_t2d=False)
        known = [r for r in further if set(r.head.taps) <= set(layers) and r.key != best[0].key]
        second = _best(effort, [(reading, measure(reading)) for reading in known], best[1])
        chain += [second] if second is not None else []
    tried_out = [(reading, each, effort.prefers(reading, each, now)) for reading, each in found]
    return _report(recipe, pair, states, now, tried_out, chain)


def chosen(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` prompts spread over the file, the same ones each time."""
    no_string(prompts, "prompts", "prompts")
    spread = random.Random(0).sample(range(len(prompts)), min(count, len(prompts)))  # noqa: S311 - no secret
    return [prompts[index] for index in sorted(spread)]


def _loaded(pair: tuple[Checkpoint, Checkpoint]) -> dict[str, Tensor]:
    """Return the draft's weights in float32; of an embedding, only the rows that are read become float32."""
    target, draft = pair
    refs = dict(weights(draft)) | shared_weights(draft, target)
    names = [spec.name for spec in weight_specs(draft.config)]
    found = {name: read_tensor(refs[name]) for name in (*names, T2D) if name in refs}
    loaded = {n: t if n in (EMBEDDING, T2D) else t.long() if n == D2T else t.float() for n, t in found.items()}
    return loaded | ({HEAD: loaded[EMBEDDING].float()} if draft.config.tied else {})


def _agreement(
    pair: tuple[Checkpoint, Checkpoint], loaded: Mapping[str, Tensor], states: Sequence[TargetStates], places: int,
    reading: Reading,
) -> Agreement:  # fmt: skip
    config, head = reading.config, reading.config.eagle3
    guesses = CHAINS[config.draft_kind.method]
    batches = [group.batch(() if head is None else head.taps) for group in states]
    return agreement(guesses, config, dict(loaded), _ids(pair[1], loaded, reading), batches, places)


def _screened(at: Measure, now: Agreement, places: int, reading: Reading) -> Agreement:
    """Return a reading's agreement, of the first place alone where that is worse than the current one's."""
    first, limit = at(1, reading), SCREENED if reading.is_usual else 1.0
    return first if first.by_place[0] < limit * now.by_place[0] else at(places, reading)


def _ids(draft: Checkpoint, loaded: Mapping[str, Tensor], reading: Reading) -> Tensor:
    """Return the target's ids of the draft's vocabulary, int64."""
    if draft.config.draft_vocab is None:
        return torch.arange(draft.config.out_vocab)
    if reading.vocabulary == T2D:
        marked = loaded[T2D].nonzero()[:, 0][: draft.config.draft_vocab]
        return torch.nn.functional.pad(marked, (0, draft.config.draft_vocab - len(marked)))
    return torch.arange(draft.config.draft_vocab) + loaded[D2T]


def _best(effort: Effort, found: Found, now: Agreement) -> tuple[Reading, Agreement] | None:
    """Return the reading that is right most often, of those that are clearly better than the current one."""
    better = [(reading, each) for reading, each in found if effort.prefers(reading, each, now)]
    return max(better, key=lambda pair: float(pair[1].lengths.mean()), default=None)


def _report(
    recipe: Recipe, pair: tuple[Checkpoint, Checkpoint], states: Sequence[TargetStates], now: Agreement,
    tried: Sequence[tuple[Reading, Agreement, bool]], chain: Found,
) -> DraftReport:  # fmt: skip
    target, draft = pair
    is_head, stated = draft.config.eagle3 is not None, recipe.validate_.gates.acceptance
    steps = recipe.speculation.draft_tokens
    setting = ", ".join(reading.line for reading, _ in chain) or None
    shown = [_measured(reading.line, each, max(steps), better=better) for reading, each, better in tried]
    shown += [_measured(setting, chain[-1][1], max(steps), better=True)] if setting and len(chain) > 1 else []
    note = verifier_note(recipe.target.source, draft.config_json)
    return DraftReport(
        recipe=recipe.name,
        read=eagle3.describe(draft.config) if is_head else f"draft model of {draft.config.layers} layers",
        doubts=eagle3.doubts(draft.config_json) if is_head else (),
        notes=(note,) if note else (),
        prompts=sum(len(group.tokens_BT1) for group in states),
        chains=len(now.lengths),
        chance=now.chance,
        vocabulary=_coverage(target, draft, now),
        current=_measured("as the file and the recipe say", now, max(steps)),
        others=tuple(sorted(shown, key=lambda each: -each.tokens_per_step)),
        expected=tuple(_expected(recipe, now)),
        setting=setting,
        verdict=_verdict(now, setting, stated),
        stated=stated,
    )


def _measured(reading: str, found: Agreement, steps: int, *, better: bool = False) -> Measured:
    per_step = found.tokens_per_step(steps)
    return Measured(reading=reading, by_place=found.by_place, tokens_per_step=per_step, better=better)


def _verdict(now: Agreement, setting: str | None, stated: tuple[float, ...]) -> Verdict:
    if setting is not None:
        return "another reading"
    if now.is_chance:
        return "chance"
    if stated and now.by_place[0] < HALF * stated[0]:
        return "below the stated rates"
    return "agrees"


def _coverage(target: Checkpoint, draft: Checkpoint, now: Agreement) -> Coverage:
    """Return the draft's vocabulary and the share of the answers' tokens that it has."""
    config = draft.config
    ids = torch.arange(config.out_vocab)
    if config.draft_vocab is not None:
        ids = ids + read_tensor(weights(draft)[D2T]).long()
    share = torch.isin(now.expected_N, ids).double().mean()
    return Coverage(tokens=config.out_vocab, of=target.config.vocab, answers=float(share))


def _expected(recipe: Recipe, now: Agreement) -> list[Expected]:
    """Return tokens per step and, where the recipe states the costs of steps, the speed-up of each K."""
    costs = recipe.speculation.step_costs
    listed = least(costs) if costs else None
    found = []
    for place, steps in enumerate(recipe.speculation.draft_tokens):
        per_step, cost = now.tokens_per_step(steps), listed[place] if listed else None
        speed_up = per_step / cost if cost else None
        found.append(Expected(draft_tokens=steps, tokens_per_step=per_step, step_cost=cost, speed_up=speed_up))
    return found
