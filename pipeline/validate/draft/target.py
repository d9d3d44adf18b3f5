"""The target's greedy answers to prompts, and its states at all layers that a reading of the draft may need. Eager.

Shapes: B rows, T tokens, H hidden, X states of several layers concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.errors import no_string
from pipeline.graphs.dtypes import torch_dtype
from pipeline.models.parallel import Seams, State
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
        shape = (len(self.prompts), config.kv_heads, self.length + 1, config.head_dim)
        state: State = {
            f"{part}.{layer}": torch.zeros(shape, dtype=self.dtype) for layer in range(config.layers) for part in "kv"
        }
        return Model(config, self.weights, state, _Narrow(), taps=taps)


def _answer_group(target: _Target, layers: tuple[int, ...]) -> TargetStates:
    sequences = [[*prompt, *new] for prompt, new in zip(target.prompts, _greedy(target), strict=True)]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    prompts = torch.tensor([len(prompt) for prompt in target.prompts])
    tokens = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    hidden = target.model(layers).read(_prompt(tokens[:, :-1], lengths - 1))
    positions = torch.arange(tokens.shape[1] - 1)
    learn = (positions >= prompts[:, None] - 1) & (positions < lengths[:, None] - 1)
    parts = hidden.taps_BTX.chunk(len(layers), dim=-1) if hidden.taps_BTX is not None else ()
    return TargetStates(tokens, learn, dict(zip(sorted(layers), parts, strict=True)), hidden.last_BTH)


def _greedy(target: _Target) -> list[list[int]]:
    """Return the greedy answers, each up to its end-of-sequence token."""
    model, prompts = target.model(), target.prompts
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    last = take(model.read(_prompt(tokens, lengths)).last_BTH, lengths - 1)
    chosen = [model.greedy(last[:, None])]
    everyone = torch.ones(len(prompts), dtype=torch.bool)
    for step in range(target.new - 1):
        positions = lengths[:, None] + step
        hidden = model.hidden(chosen[-1], positions, everyone, target.length)
        chosen.append(model.greedy(hidden.last_BTH))
    return [_until_end(row, target.checkpoint.config.eos_ids) for row in torch.cat(chosen, dim=1).tolist()]


def _until_end(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def _prompt(tokens_BT: Tensor, lengths_B: Tensor) -> Prompt:
    positions = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    return Prompt(tokens_BT, positions, lengths_B, torch.arange(len(tokens_BT)))
