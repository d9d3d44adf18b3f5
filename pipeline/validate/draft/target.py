"""The target's greedy answers to prompts, and its states at all layers that a reading of the draft may need. Eager.

Shapes: B rows, T tokens, H hidden, X states of several layers concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pipeline.errors import no_string
from pipeline.graphs.dtypes import torch_dtype
from pipeline.models.caches import empty_caches
from pipeline.models.parallel import Seams
from pipeline.models.weights import weight_specs
from pipeline.progress import Progress, no_progress
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.speculation.chains import Batch
from pipeline.speculation.drafters import take
from pipeline.speculation.model import Model, Prompt

ROWS = 8
"""Prompts that are answered together."""


class _Narrow(Seams):
    """Computes logits in the model's dtype: the LM head is the largest product, and only the best token is read."""

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        return self.linear(x_BTI, weight, rows).float()


@dataclass(frozen=True)
class TargetStates:
    """Some answered prompts: tokens int64 [B, T + 1], answer positions, states by layer and the output, [B, T, H]."""

    tokens_BT1: Tensor
    learn_BT: Tensor
    by_layer: dict[int, Tensor]
    last_BTH: Tensor

    def batch(self, taps: tuple[int, ...]) -> Batch:
        """Return the batch of a draft that reads the inputs of these layers; without layers, the output alone."""
        states = [self.by_layer[tap] for tap in taps] or [self.last_BTH]
        return Batch(self.tokens_BT1, torch.cat(states, dim=-1).float(), self.last_BTH.float(), self.learn_BT)


@torch.inference_mode()
def answer(
    target: Checkpoint, prompts: Sequence[list[int]], new: int, layers: tuple[int, ...], dtype: str,
    progress: Progress = no_progress,
) -> list[TargetStates]:  # fmt: skip
    """Answer prompts with at most `new` tokens each; `layers` are those whose inputs are kept."""
    no_string(prompts, "prompts", "prompts")
    kind = torch_dtype(dtype)
    refs = weights(target)
    loaded = {spec.name: read_tensor(refs[spec.name]).to(kind) for spec in weight_specs(target.config)}
    groups = [prompts[start : start + ROWS] for start in range(0, len(prompts), ROWS)]
    found = []
    for number, group in enumerate(groups):
        progress("answers of the target", number, len(groups))
        found.append(_answer_group(_Target(target, loaded, kind, group, new), layers))
    progress("answers of the target", len(groups), len(groups))
    return found


@dataclass(frozen=True)
class _Target:
    """A loaded target and the prompts of one group."""

    checkpoint: Checkpoint
    weights: dict[str, Tensor]
    dtype: torch.dtype
    prompts: Sequence[list[int]]
    new: int

    @property
    def length(self) -> int:
        """Longest prompt with its answer."""
        return max(map(len, self.prompts)) + self.new

    def model(self, taps: tuple[int, ...] = ()) -> Model:
        """Return the target with empty caches."""
        config = self.checkpoint.config
        state = empty_caches(config, len(self.prompts), self.length + 1, self.dtype)
        return Model(config, self.weights, state, _Narrow(), taps=taps)


def _answer_group(target: _Target, layers: tuple[int, ...]) -> TargetStates:
    prompts_B = torch.tensor([len(prompt) for prompt in target.prompts])
    answers_BN, states_BTX, last_BTH = _greedy(target, prompts_B, layers)
    sequences = [
        torch.tensor([*prompt, *_until_end(row, target.checkpoint.config.eos_ids)])
        for prompt, row in zip(target.prompts, answers_BN.tolist(), strict=True)
    ]
    tokens_BT, ends_B = pad_sequence(sequences, batch_first=True), torch.tensor([len(each) for each in sequences])
    longest = tokens_BT.shape[1]
    positions_T = torch.arange(longest - 1)
    learn = (positions_T >= prompts_B[:, None] - 1) & (positions_T < ends_B[:, None] - 1)
    parts = states_BTX[:, : longest - 1].chunk(len(layers), dim=-1) if layers else ()
    by_layer = dict(zip(sorted(layers), parts, strict=True))
    return TargetStates(tokens_BT, learn, by_layer, last_BTH[:, : longest - 1])


def _greedy(target: _Target, lengths_B: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the greedy answers, int64 [B, N]; of prompts and answers, the states [B, T, X] and outputs [B, T, H]."""
    model, rows_B = target.model(layers), torch.arange(len(target.prompts))
    tokens_BT = pad_sequence([torch.tensor(prompt) for prompt in target.prompts], batch_first=True)
    read = model.read(_prompt(tokens_BT, lengths_B))
    chosen = [model.greedy(take(read.last_BTH, lengths_B - 1)[:, None])]
    kept = [part for part in (read.last_BTH, read.taps_BTX) if part is not None]
    kept = [functional.pad(part, (0, 0, 0, target.length - part.shape[1])) for part in kept]
    everyone = torch.ones_like(rows_B, dtype=torch.bool)
    for step in range(target.new - 1):
        positions_B = lengths_B + step
        hidden = model.hidden(chosen[-1], positions_B[:, None], everyone, target.length)
        chosen.append(model.greedy(hidden.last_BTH))
        for part, new in zip(kept, (hidden.last_BTH, hidden.taps_BTX), strict=False):
            assert new is not None
            part[rows_B, positions_B] = new[:, 0]
    return torch.cat(chosen, dim=1), kept[-1], kept[0]


def _until_end(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def _prompt(tokens_BT: Tensor, lengths_B: Tensor) -> Prompt:
    positions = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    return Prompt(tokens_BT, positions, lengths_B, torch.arange(len(tokens_BT)))
