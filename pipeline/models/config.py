"""Configuration of a decoder without its weights: sizes, rotary embedding, options. Imports no torch.

One `ModelConfig` describes every supported family; the family files (`llama.py`, `qwen2.py`, ...) only translate their
Hugging Face `config.json` into it and reject unsupported fields by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.models.draft_kind import DRAFT_MODEL, EAGLE3, DraftKind


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


TapMeaning = Literal["inputs", "outputs", "unclear"]
"""What an id k in a head's file is: the input of layer k, its output, or one of both by the target's depth."""


@dataclass(frozen=True)
class TapIds:
    """Tapped layers as a head's file lists them: the field of `config.json`, its ids, and what they mean."""

    field: str
    ids: tuple[int, ...]
    meaning: TapMeaning


@dataclass(frozen=True)
class Eagle3:
    """How an EAGLE-3 head (Li et al. 2025) is read: a one-layer draft over the target's hidden states.

    `writer` is the tool that wrote the file. `taps` are the layers whose inputs the head reads, ascending; the number
    of layers means the output of the last one. They are empty until the target is known (`models.eagle3.fitted`), and
    for a head that `reads_output`: the target's output after its last norm, without `fc`. `tap_count` is their number,
    `written` what the file says of them.

    `norm_before_residual`: the residual stream starts from the normalised features. `norm_before_fc`: one norm over all
    tapped states before `fc`; `fc_norm`: one for each of them. `hidden_norm`: the features are normalised before the
    attention. `norm_output`: the head's own output is fed back after its last norm, not before.
    """

    target_hidden: int
    taps: tuple[int, ...] = ()
    norm_before_residual: bool = False
    writer: str = "tandem"
    tap_count: int = 3
    written: TapIds | None = None
    reads_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    hidden_norm: bool = True
    norm_output: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped decoder: RMSNorm, rotary attention with grouped KV heads, SwiGLU.

    `draft_vocab` is the size of a reduced output vocabulary (EAGLE-3 convention: target id = draft id + d2t[draft id]);
    None means the output vocabulary is `vocab`. `shares_embedding`: the checkpoint has no embedding and uses the
    target's. `shares_head`: it has no LM head and uses the target's. `window` is the sliding window of some or all
    layers: attention within it is full attention, and the plan rejects longer caches.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    max_position: int
    rope_scaling: Llama3Rope | None = None
    rope_linear_factor: float = 1.0
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    draft_vocab: int | None = None
    shares_embedding: bool = False
    shares_head: bool = False
    eos_ids: tuple[int, ...] = field(default=())
    window: int | None = None
    eagle3: Eagle3 | None = None

    @property
    def out_vocab(self) -> int:
        """Rows of the LM head."""
        return self.draft_vocab or self.vocab

    @property
    def draft_kind(self) -> DraftKind:
        """The kind of draft of this model."""
        return DRAFT_MODEL if self.eagle3 is None else EAGLE3
