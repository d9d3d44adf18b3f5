"""Configuration of a decoder without its weights: sizes, rotary embedding, options. Imports no torch.

One `ModelConfig` describes every supported family; the family files (`llama.py`, `qwen2.py`, ...) only translate their
Hugging Face `config.json` into it and reject unsupported fields by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.models.draft_kind import DRAFT_MODEL, EAGLE3, DraftKind


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Eagle3:
    """Fields of an EAGLE-3 head (Li et al. 2025): a one-layer draft that reads the target's hidden states.

    `taps` are the target's layers whose inputs the head reads; empty for the convention's (see
    `models.eagle3.taps_of`). `norm_before_residual`: the residual stream starts from the normalised features.
    """

    target_hidden: int
    taps: tuple[int, ...] = ()
    norm_before_residual: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped decoder: RMSNorm, rotary attention with grouped KV heads, SwiGLU.

    `draft_vocab` is the size of a reduced output vocabulary (EAGLE-3 convention: target id = draft id + d2t[draft id]);
    None means the output vocabulary is `vocab`. `shares_embedding`: the checkpoint has no embedding and uses the
    target's. `window` is the sliding window of some or all layers: attention within it is full attention, and the plan
    rejects longer caches.
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
