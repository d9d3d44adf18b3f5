"""Measure an artifact: plain and speculative decode interleaved over the same prompts, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.models.weights import D2T

if TYPE_CHECKING:
    from pipeline.artifact.signing import Policy

Answer = Callable[[list[int]], tuple[list[float], int]]
"""Answers a prompt: arrival time of each token in seconds from the start, and steps taken."""


@dataclass(frozen=True)
class Figures:
    """One request at a time: median time to the first token, and quantiles over tokens of the time that each took.

    Tokens of one step share its time.
    """

    name: str
    first_token_ms: float
    p50_ms: float
    p99_ms: float
    tokens_per_s: float
    tokens_per_step: float


def bench(
    root: Path, base: Path, count: int, max_new_tokens: int, against: str | None, policy: Policy | None = None
) -> list[Figures]:
    """Measure `count` of the recipe's prompts; `base` is the folder that its relative paths start at.

    Raises:
        InputError: the prompts of the recipe are not here.
        ArtifactError: as `runtime.load`.

    """
    from pipeline.recipe import load as load_recipe
    from pipeline.runtime.open import load
    from pipeline.validate.prompts import load_prompts, prompts_path

    recipe = load_recipe(root / "recipe.yaml")
    prompts = load_prompts(prompts_path(recipe.validate_.prompts, base))
    engine = load(root, policy)
    step = max(len(prompts) // count, 1)
    texts = [prompt.text for prompt in prompts[::step]][:count]
    encoded = [engine.text.chat(text) if engine.text.has_chat else engine.text.encode(text) for text in texts]
    contenders = {
        "plain decode": _artifact(engine, max_new_tokens, speculate=False),
        "speculation": _artifact(engine, max_new_tokens, speculate=True),
    }
    if against == "hf":
        contenders |= transformers_answers(recipe, base, max_new_tokens)
    for answer in contenders.values():
        answer(encoded[0])
    runs: dict[str, list[tuple[list[float], int]]] = {name: [] for name in contenders}
    for tokens in encoded:
        for name, answer in contenders.items():
            runs[name].append(answer(tokens))
    return [_figures(name, found) for name, found in runs.items()]


def _artifact(engine: Any, limit: int, *, speculate: bool) -> Answer:
    def answer(tokens: list[int]) -> tuple[list[float], int]:
        arrivals: list[float] = []
        steps = -1  # the first token is the prefill's
        started = time.perf_counter()

        def on_tokens(index: int, new: list[int]) -> None:  # noqa: ARG001 - the engine's callback
            nonlocal steps
            arrivals.extend([time.perf_counter() - started] * len(new))
            steps += 1

        engine.generate([tokens], max_new_tokens=limit, speculate=speculate, on_tokens=on_tokens)
        return arrivals, steps

    return answer


def transformers_answers(recipe: Any, base: Path, limit: int) -> dict[str, Answer]:
    """`generate`, and assisted generation with the same pair and K where the draft is a model."""
    from pipeline.cache.local import default_root
    from pipeline.measure.hf_model import build_model
    from pipeline.sources.pair import resolve_pair

    target, draft = resolve_pair(recipe, base=base, cache=default_root() / "sources")
    model = build_model(target, target, recipe.target.dtype, "sdpa")
    plain = {"transformers generate": _generate(model, None, limit)}
    if draft.config.eagle3 is not None:  # transformers has no such drafts
        return plain
    assistant = build_model(draft, target, recipe.draft.dtype or recipe.target.dtype, "sdpa")
    if draft.config.draft_vocab is not None:
        assistant.lm_head = _whole_head(assistant.lm_head, draft, target.config.vocab)
    assistant.generation_config.num_assistant_tokens = recipe.speculation.draft_tokens[0]
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return plain | {"transformers assisted": _generate(model, assistant, limit)}


def _generate(model: Any, assistant: Any, limit: int) -> Answer:
    import torch

    def answer(tokens: list[int]) -> tuple[list[float], int]:
        given = torch.tensor([tokens])
        clock = _Clock(len(tokens))
        with torch.no_grad():
            model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=limit, do_sample=False,
                assistant_model=assistant, streamer=clock,
            )  # fmt: skip
        return clock.arrivals, clock.steps

    return answer


def _whole_head(head: Any, draft: Any, vocab: int) -> Any:
    """A head of a reduced vocabulary that gives logits of the whole one, which is all that transformers knows."""
    import torch

    from pipeline.sources.weights import weights
    from pipeline.validate.reference.goldens import read_tensor

    ids = torch.arange(draft.config.draft_vocab) + read_tensor(weights(draft)[D2T]).long()

    class WholeHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            few = self.head(hidden)
            return few.new_full((*few.shape[:-1], vocab), -torch.inf).index_copy(-1, ids, few)

    return WholeHead()


class _Clock:
    """A transformers streamer that keeps arrival times."""

    def __init__(self, prompt: int) -> None:
        self.arrivals: list[float] = []
        self.steps = -1
        self._prompt, self._started = prompt, time.perf_counter()

    def put(self, value: Any) -> None:
        """Take tokens; the first are the prompt."""
        new = value.numel() - self._prompt
        self._prompt = 0
        if new > 0:
            self.arrivals.extend([time.perf_counter() - self._started] * new)
            self.steps += 1

    def end(self) -> None:
        """Nothing to flush."""


def _latencies(arrivals: list[float]) -> Iterator[float]:
    """What each token after the first took, in seconds: its step's time over the tokens of that step."""
    steps = [(time_, len(list(tokens))) for time_, tokens in groupby(arrivals)]
    for (before, _), (now, count) in pairwise(steps):
        yield from [(now - before) / count] * count


def _figures(name: str, runs: list[tuple[list[float], int]]) -> Figures:
    took = sorted(each for arrivals, _ in runs for each in _latencies(arrivals)) or [0.0]
    return Figures(
        name,
        median(arrivals[0] for arrivals, _ in runs) * 1e3,
        median(took) * 1e3,
        took[ceil(len(took) * 0.99) - 1] * 1e3,
        sum(len(a) for a, _ in runs) / sum(a[-1] for a, _ in runs),
        sum(len(a) - 1 for a, _ in runs) / max(sum(s for _, s in runs), 1),
    )
