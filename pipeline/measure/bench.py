"""Measure an artifact: plain and speculative decode interleaved over the same prompts, in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact.signing import Policy
from pipeline.errors import no_string
from pipeline.progress import Log, no_log
from pipeline.recipe import load as load_recipe
from pipeline.runtime.latency import Answer, TimedRequest, engine_answer, latency_of
from pipeline.runtime.open import load
from pipeline.validate.lengths import cut_warning, longest_prompt
from pipeline.validate.prompts import recipe_prompts


@dataclass(frozen=True)
class Figures:
    """One request at a time: median first-token time, quantiles over tokens of inter-token latency, and rates.

    Definitions: `pipeline/runtime/latency.py`. A quantile is 0 where no token followed a first one.
    """

    name: str
    first_token_ms: float
    p50_ms: float
    p99_ms: float
    tokens_per_s: float
    tokens_per_step: float


def bench(
    root: Path, base: Path, count: int, max_new_tokens: int, against: str | None, policy: Policy | None = None,
    log: Log = no_log,
) -> list[Figures]:  # fmt: skip
    """Measure `count` of the recipe's prompts; `base` is the folder that its relative paths start at.

    As in the gates, prompts that do not fit the caches with an answer are cut to their last tokens.

    Raises:
        InputError: no prompts file of the recipe.
        ArtifactError: as `runtime.load`.

    """
    recipe = load_recipe(root / "recipe.yaml")
    prompts = recipe_prompts(recipe, base)
    engine = load(root, policy, share_prefixes=False)
    step = max(len(prompts) // count, 1)
    whole = [engine.text.encode_prompt(prompt.text) for prompt in prompts[::step][:count]]
    shapes = engine.manifest.shapes
    longest = longest_prompt(shapes, max_new_tokens)
    if warning := cut_warning([len(tokens) for tokens in whole], shapes, max_new_tokens):
        log(warning)
    encoded = [tokens[-longest:] for tokens in whole]
    contenders = {
        "plain decode": engine_answer(engine, max_new_tokens, speculate=False),
        "speculation": engine_answer(engine, max_new_tokens),
    }
    if against == "hf":
        from pipeline.measure.hf_model import transformers_answers  # transformers takes seconds to import

        contenders |= transformers_answers(recipe, base, max_new_tokens)
    return [figures_of(name, requests) for name, requests in interleaved(contenders, encoded).items()]


def interleaved(contenders: Mapping[str, Answer], prompts: Sequence[list[int]]) -> dict[str, list[TimedRequest]]:
    """Time all contenders on each prompt in turn; a first answer of each is a warm-up."""
    no_string(prompts, "prompts", "prompts")
    for answer in contenders.values():
        answer(prompts[0])
    requests: dict[str, list[TimedRequest]] = {name: [] for name in contenders}
    for tokens in prompts:
        for name, answer in contenders.items():
            requests[name].append(answer(tokens))
    return requests


def figures_of(name: str, requests: Sequence[TimedRequest]) -> Figures:
    """Return the measurements of one contender."""
    latency = latency_of(requests)
    return Figures(
        name,
        latency.first_token_ms,
        latency.token_p50_ms or 0.0,
        latency.token_p99_ms or 0.0,
        latency.tokens_per_s,
        latency.tokens_per_step,
    )
