"""The Markov head of a DSpark draft: a bias on a draft token's logits, by the token before it. Pure functions.

Source: the Markov heads of SpecForge 0.2 and speculators 0.9, which compute the same.

Shapes: B rows, T tokens, H hidden, R rank, V vocabulary of the draft.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Weights
from pipeline.models.parallel import Seams
from pipeline.models.weights import MARKOV_GATES, MARKOV_W1, MARKOV_W2


def bias(
    config: ModelConfig, weights: Weights, seams: Seams, previous_BT: Tensor, hidden_BTH: Tensor,
    state_BTR: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return what is added to the logits, float32 [B, T, V], and the recurrent cell's next state, [B, T, R].

    `previous_BT` are the target's ids of the tokens before, `hidden_BTH` the LM head's inputs. The cell begins with a
    state of zeros (None); the other kinds of Markov heads have no state.
    """
    assert config.eagle3 is not None
    assert config.eagle3.markov is not None
    kind, rank = config.eagle3.markov.kind, config.eagle3.markov.rank
    out_BTR = seams.embed(previous_BT, weights[MARKOV_W1]).to(hidden_BTH.dtype)
    next_BTR = None
    if kind == "gated":
        gate_BTR = _gates(weights, seams, kind, torch.cat((hidden_BTH, out_BTR), dim=-1), rank)
        out_BTR = torch.sigmoid(gate_BTR) * out_BTR
    elif kind == "rnn":
        state_BTR = torch.zeros_like(out_BTR) if state_BTR is None else state_BTR
        read_BTX = torch.cat((state_BTR, out_BTR, hidden_BTH), dim=-1)
        keep_BTR, new_BTR, out_BTR = _gates(weights, seams, kind, read_BTX, 3 * rank).chunk(3, dim=-1)
        keep_BTR = torch.sigmoid(keep_BTR)
        next_BTR = keep_BTR * state_BTR + (1 - keep_BTR) * torch.tanh(new_BTR)
        out_BTR = torch.tanh(out_BTR)
    return seams.head(out_BTR, weights[MARKOV_W2], config.out_vocab), next_BTR


def first_state(config: ModelConfig, hidden_BTH: Tensor) -> Tensor | None:
    """Return the recurrent cell's state at the start of a block, [B, 1, R]; None for other kinds of Markov heads."""
    assert config.eagle3 is not None
    assert config.eagle3.markov is not None
    if config.eagle3.markov.kind != "rnn":
        return None
    return hidden_BTH.new_zeros(hidden_BTH.shape[0], 1, config.eagle3.markov.rank)


def _gates(weights: Weights, seams: Seams, kind: str, x_BTX: Tensor, rows: int) -> Tensor:
    layer = MARKOV_GATES["gated" if kind == "gated" else "rnn"]
    return seams.linear(x_BTX, weights[f"{layer}.weight"], rows) + weights[f"{layer}.bias"]
