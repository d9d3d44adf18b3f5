"""Faults to plant in an eager engine: what a broken build could do to a model, a cache or a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from pipeline.graphs import module
from pipeline.models.config import Layer
from pipeline.models.parallel import Attend, attend_up_to
from pipeline.models.weights import EMBEDDING
from pipeline.speculation import drafters, model
from pipeline.speculation import phases as graphs
from support.eager import EagerRanks

Plant = Callable[[EagerRanks, int], None]
"""Spoils ranks, with a seed."""


def perturbed_layer(ranks: EagerRanks, seed: int) -> None:
    """Every weight of one layer off by 1%, at random."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in list(ranks.tensors.items()):
        if name.startswith("target/model.layers.1."):
            noise = torch.randn(tensor.shape, generator=generator)
            ranks.tensors[name] = (tensor.float() * (1 + 0.01 * noise)).to(tensor.dtype)


def wrong_rope_base(ranks: EagerRanks, seed: int) -> None:
    """Rotary base of another model, for the target only."""
    models = ranks.shape.models
    rope = models.target.kinds[0].rope
    assert rope is not None
    target = replace(models.target, kinds=(Layer(replace(rope, theta=rope.theta * (2 + seed))),))
    ranks.shape = replace(ranks.shape, models=replace(models, target=target))


def swapped_query_heads(ranks: EagerRanks, seed: int) -> None:
    """Two query heads of one layer, in each other's place."""
    _swap(ranks, "q_proj", 0, 2 + seed % 4)


def swapped_key_heads(ranks: EagerRanks, seed: int) -> None:
    """Two key heads of one layer, in each other's place."""
    _swap(ranks, "k_proj", 0, 1 + seed % 3)


def _swap(ranks: EagerRanks, name: str, first: int, second: int) -> None:
    key, size = f"target/model.layers.1.self_attn.{name}.weight", ranks.shape.target.head_dim
    weight = ranks.tensors[key].clone()
    a, b = slice(first * size, (first + 1) * size), slice(second * size, (second + 1) * size)
    weight[a], weight[b] = ranks.tensors[key][b], ranks.tensors[key][a]
    ranks.tensors[key] = weight


def mask_sees_one_more(ranks: EagerRanks, seed: int) -> None:
    """Every query sees one key after its own position, in all graphs that read the cache."""
    ranks.around = _mask(lambda seen: seen | seen.roll(1, -1), ("score", "decode", "speculate"))


def mask_misses_the_oldest(ranks: EagerRanks, seed: int) -> None:
    """No query sees position 0, in the graph that speculates only."""

    def shift(seen: torch.Tensor) -> torch.Tensor:
        seen = seen.clone()
        seen[..., 0] &= ~seen[..., 1]
        return seen

    ranks.around = _mask(shift, ("speculate",))


def _mask(change: Callable[[torch.Tensor], torch.Tensor], phases: tuple[str, ...]):
    @contextmanager
    def around(spec, state) -> Iterator[None]:
        def changed(last_BT: torch.Tensor, kv: int = 0, rows_B: torch.Tensor | None = None) -> Attend:
            attend = attend_up_to(last_BT, kv, rows_B)
            seen = change(attend.bias_BTS == 0) if spec.phase in phases else attend.bias_BTS == 0
            return replace(attend, bias_BTS=torch.where(seen, 0.0, -torch.inf))

        model.attend_up_to = changed
        try:
            yield
        finally:
            model.attend_up_to = attend_up_to

    return around


def chunks_begin_at_zero(ranks: EagerRanks, seed: int) -> None:
    """Prefill graphs take every chunk of a prompt for its beginning."""
    ranks.around = _positions(lambda position_B: torch.zeros_like(position_B))


def chunks_begin_one_late(ranks: EagerRanks, seed: int) -> None:
    """Chunks of a prompt but the first are one position too far."""
    ranks.around = _positions(lambda position_B: position_B + (position_B > 0))


def _positions(change: Callable[[torch.Tensor], torch.Tensor]):
    @contextmanager
    def around(spec, state) -> Iterator[None]:
        prompt = module._prompt
        module._prompt = lambda spec, tensors: prompt(spec, {**tensors, "position": change(tensors["position"])})
        try:
            yield
        finally:
            module._prompt = prompt

    return around


def stale_row(ranks: EagerRanks, seed: int) -> None:
    """One position of one row keeps what was there: its key in layer 1 is never stored for good."""

    @contextmanager
    def around(spec, state) -> Iterator[None]:
        kept = state["target/k.1"][0, :, 5 + seed].clone() if "target/k.1" in state else None
        yield
        if kept is not None:
            state["target/k.1"][0, :, 5 + seed] = kept

    ranks.around = around


def bfloat16_weights(ranks: EagerRanks, seed: int) -> None:
    """Weights went through bfloat16."""
    for name, tensor in ranks.tensors.items():
        if name.startswith("target/") and tensor.dtype == torch.float32:
            ranks.tensors[name] = tensor.bfloat16().float()


def bfloat16_caches(ranks: EagerRanks, seed: int) -> None:
    """The target's values are cached in bfloat16."""

    @contextmanager
    def around(spec, state) -> Iterator[None]:
        yield
        for name, tensor in state.items():
            if name.startswith("target/v."):
                tensor.copy_(tensor.bfloat16())

    ranks.around = around


def shifted_shard(ranks: EagerRanks, seed: int) -> None:
    """The second of two ranks' slices of an MLP weight begins a row late."""
    _shift(ranks, "target/model.layers.1.mlp.up_proj.weight")


def shifted_vocabulary(ranks: EagerRanks, seed: int) -> None:
    """The second of two ranks' slices of the vocabulary begins a row late."""
    _shift(ranks, f"target/{EMBEDDING}")


def _shift(ranks: EagerRanks, name: str) -> None:
    weight = ranks.tensors[name].clone()
    half = len(weight) // 2
    weight[half:] = weight[half:].roll(1, 0)
    ranks.tensors[name] = weight


def always_accepted(ranks: EagerRanks, seed: int) -> None:
    """Sampled drafts are accepted whatever the target thinks of them."""
    ranks.around = _acceptance(lambda drafts, target: torch.cat((drafts, target[:, -1:]), 1))


def second_draft_unchecked(ranks: EagerRanks, seed: int) -> None:
    """The second draft of a sampled step is accepted with the first."""
    ranks.around = _acceptance(lambda drafts, target: torch.cat((target[:, :1], drafts[:, 1:2], target[:, 2:]), 1))


def _acceptance(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
    @contextmanager
    def around(spec, state) -> Iterator[None]:
        original = graphs.accept
        if spec.sampling == "stochastic":
            graphs.accept = lambda drafts, target, *rest: original(drafts, change(drafts, target), *rest)
        try:
            yield
        finally:
            graphs.accept = original

    return around


def top_k_off_keeps_one_token(ranks: EagerRanks, seed: int) -> None:
    """`top_k` 0, every client's default, keeps one token instead of all."""
    ranks.around = _sampling(lambda s: replace(s, top_k_B=torch.where(s.top_k_B > 0, s.top_k_B, 1)))


def top_p_of_one_keeps_one_token(ranks: EagerRanks, seed: int) -> None:
    """`top_p` 1 is read as 0."""
    ranks.around = _sampling(lambda s: replace(s, top_p_B=torch.where(s.top_p_B >= 1, 0.0, s.top_p_B)))


def settings_of_another_row(ranks: EagerRanks, seed: int) -> None:
    """Every row samples with the settings of the row before it."""
    ranks.around = _sampling(
        lambda s: replace(
            s, temperature_B=s.temperature_B.roll(1), top_k_B=s.top_k_B.roll(1), top_p_B=s.top_p_B.roll(1)
        ),
        batched=True,
    )


def greedy_first_token(ranks: EagerRanks, seed: int) -> None:
    """Prefill graphs ignore the temperature."""
    ranks.around = _sampling(lambda s: replace(s, temperature_B=torch.zeros_like(s.temperature_B)), ("prefill",))


def one_temperature(ranks: EagerRanks, seed: int) -> None:
    """Every sampled row has temperature 1.3."""
    ranks.around = _sampling(lambda s: replace(s, temperature_B=torch.where(s.temperature_B > 0, 1.3, 0.0)))


def _sampling(change, phases: tuple[str, ...] = ("prefill", "decode", "speculate"), batched: bool = False):
    original = model.sample

    @contextmanager
    def around(spec, state) -> Iterator[None]:
        if spec.phase in phases and (spec.batch > 1 or not batched):
            model.sample = lambda logits, sampling, *rest: original(logits, change(sampling), *rest)
        try:
            yield
        finally:
            model.sample = original

    return around


def seed_of_the_first_row(ranks: EagerRanks, seed: int) -> None:
    """Every row samples with the seed of row 0."""
    ranks.around = _sampling(lambda s: replace(s, seed_B2=s.seed_B2[:1].expand_as(s.seed_B2)), batched=True)


def half_of_the_seed(ranks: EagerRanks, seed: int) -> None:
    """The upper half of a seed does not count."""
    ranks.around = _sampling(lambda s: replace(s, seed_B2=s.seed_B2 * torch.tensor([1, 0], dtype=torch.int32)))


def later_proposals_wrong(ranks: EagerRanks, seed: int) -> None:
    """Proposals after the first are other tokens: answers are right, and the speed is lost."""

    @contextmanager
    def around(spec, state) -> Iterator[None]:
        original = drafters.DraftModel.propose

        def wrong(*arguments):
            drafts = original(*arguments)
            return torch.cat((drafts[:, :1], (drafts[:, 1:] + 1) % ranks.shape.target.vocab), 1)

        drafters.DraftModel.propose = wrong
        try:
            yield
        finally:
            drafters.DraftModel.propose = original

    ranks.around = around


NUMERIC: tuple[Plant, ...] = (
    perturbed_layer, wrong_rope_base, swapped_query_heads, swapped_key_heads, mask_sees_one_more,
    mask_misses_the_oldest, stale_row, shifted_shard, shifted_vocabulary, chunks_begin_at_zero, chunks_begin_one_late,
)  # fmt: skip
FLOAT32_ONLY: tuple[Plant, ...] = (bfloat16_weights, bfloat16_caches)
ACCEPTANCE: tuple[Plant, ...] = (always_accepted, second_draft_unchecked)
SAMPLING: tuple[Plant, ...] = (
    top_k_off_keeps_one_token, top_p_of_one_keeps_one_token, settings_of_another_row, greedy_first_token,
    one_temperature, seed_of_the_first_row, half_of_the_seed,
)  # fmt: skip
