"""Run a checkpoint by transformers' own modules, one layer at a time, in two precisions.

Two runs, side by side, on the weights as the recipe's dtype holds them. The *baseline* is the same mathematics one
precision up (float32 for bfloat16 and float16, float64 for float32); *noise* is the recipe's own dtype, and shows how
far a correct implementation deviates. Layers are read, run over every sequence and dropped one at a time, so a model
needs the memory of one layer and of its hidden states, not of its weights.

Shapes: T tokens of a sequence, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipeline.graphs.dtypes import torch_dtype
from pipeline.models import int4, int8
from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import taps_of
from pipeline.models.parallel import capped
from pipeline.models.weights import (
    EMBEDDING,
    HEAD,
    INPUT_PROJECTION,
    LAYER_EMBEDDING,
    NORM,
    OF_INPUTS,
    takes_four_bits,
)
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.packed import Source
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import shared_weights, weights
from pipeline.validate.reference.golden import Golden, Summary, joined, project_cache, recorded_ids, summary
from pipeline.validate.reference.routes import Router, Routes, digest
from pipeline.validate.reference.skeleton import config_of, for_module, without_weights
from pipeline.validate.reference.widest import Widest

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")
"""Names of a layer's cache argument in versions of transformers."""

WITH_GROUPED = 5
"""Major version of transformers that has several implementations of experts."""

TOKENS_AT_ONCE = 256
HEAD_ROWS = 16384
KEPT_HEAD_BYTES = 512 << 20
"""Largest LM head that is kept in memory between sequences."""


def above(dtype: str) -> torch.dtype:
    """Return the precision of the baseline."""
    return torch.float64 if dtype == "float32" else torch.float32


OUTPUT = -1
"""In `Taps.layers`: the output after the last norm."""

TapKey = tuple[str, str | None, torch.dtype, tuple[int, ...], str]
"""Weights (dtype and storage), precision, tokens and given experts of a run."""


@dataclass
class Taps:
    """Inputs of a target's layers `layers`, which a head reads, kept from the target's own run.

    The number of layers means the output of the last one, `OUTPUT` the same after the last norm. `states` are a [T, H]
    for each layer, `routes` the experts of a run.
    """

    layers: tuple[int, ...]
    states: dict[TapKey, list[Tensor]] = field(default_factory=dict)
    routes: dict[TapKey, Routes | None] = field(default_factory=dict)

    @classmethod
    def of(cls, target: ModelConfig, draft: ModelConfig) -> Taps:
        """Return the empty taps of a pair; a draft model's has no layers."""
        reads_output = draft.eagle3 is not None and draft.eagle3.reads_output
        return cls((OUTPUT,) if reads_output else taps_of(target, draft))


class Reference:
    """A checkpoint run by transformers' own modules, one layer in memory at a time; `taps` keeps inputs of layers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Checkpoint,
        dtype: str,
        narrow: str | None = None,
        target_narrow: str | None = None,
        taps: Taps | None = None,
    ) -> None:
        self.checkpoint, self.target, self.taps = checkpoint, target, taps
        self.narrow, self.target_narrow = narrow, target_narrow
        self.dtype_name = dtype
        self.dtype = torch_dtype(dtype)
        self.kinds = (above(dtype), self.dtype)
        self._refs = dict(weights(checkpoint))
        self._kept_head: dict[torch.dtype, list[Tensor]] = {}
        shared = checkpoint.config.shares_embedding
        self._refs |= shared_weights(checkpoint, target)
        self._embedding = self._refs[EMBEDDING]
        self._embedding_narrow = target_narrow if shared else narrow

    @property
    def layers(self) -> int:
        """Layers that are read."""
        return self.checkpoint.config.layers

    @torch.no_grad()
    def goldens(self, sequences: list[list[int]], experts: Sequence[Tensor | None] = ()) -> Iterator[Golden]:
        """Run the layers over all sequences, then yield a golden for each.

        `experts` int [T, L, C] of each sequence are those that routers choose; None: their choices one precision up.
        """
        runs = self.run_layers(sequences, experts)
        routes = [run.router.routes() for run in runs[self.dtype]]
        caches = [[torch.stack(run.cache.layers, dim=1).float() for run in runs[kind]] for kind in self.kinds]
        baseline, noise = (list(self._normed(runs.pop(kind), kind)) for kind in self.kinds)
        for high, low, keys, keys_noise, of_routers in zip(baseline, noise, *caches, routes, strict=True):
            yield replace(self.golden(high, low, keys, keys_noise), routes=of_routers)

    def run_layers(
        self, sequences: list[list[int]], experts: Sequence[Tensor | None] = ()
    ) -> dict[torch.dtype, list[Recorder]]:
        """Run all layers in both precisions, along the same experts."""
        model = self.skeleton()
        given = list(experts) or [None] * len(sequences)
        routers = [Router(of_sequence) for of_sequence in given]
        starts = list(zip(sequences, given, routers, strict=True))
        runs = {kind: [self._start(model, kind, *start) for start in starts] for kind in self.kinds}
        for index, layer in enumerate(self._layers):
            prefix = f"model.layers.{index}."
            read = {n.removeprefix(prefix): self.read(n, r) for n, r in self._refs.items() if n.startswith(prefix)}
            state = for_module(layer.state_dict(), read, self.checkpoint.config)
            for kind, started in runs.items():
                layer.load_state_dict({name: tensor.to(kind) for name, tensor in state.items()}, assign=True)
                for run in started:
                    self._tap(index, run, run.hidden)
                    own = self.checkpoint.config.layer(index)
                    with run.router if own.experts else nullcontext(), Widest() if own.delta_net else nullcontext():
                        out = layer(run.hidden, *run.inputs[index], **run.options[index])
                    run.hidden = out[0] if isinstance(out, tuple) else out
            layer.to("meta")
        for kind, started in runs.items():
            for run in started:
                self._tap(len(self._layers), run, run.hidden)
            if self.taps is not None and OUTPUT in self.taps.layers:
                for run, normed_TH in zip(started, self._normed(started, kind), strict=True):
                    self._tap(OUTPUT, run, normed_TH[None])
        for run in runs[self.dtype]:
            if self.taps is not None and self.taps.layers:
                self.taps.routes[run.key] = run.router.routes()
        return runs

    def _tap(self, layer: int, run: Recorder, hidden_1TH: Tensor) -> None:
        """Keep a state that the taps list."""
        if self.taps is not None and layer in self.taps.layers:
            self.taps.states.setdefault(run.key, []).append(hidden_1TH[0])

    def tapped(self, kind: torch.dtype, tokens: list[int], experts: Tensor | None) -> TapKey:
        """Return the key of a run in `Taps`."""
        return self.dtype_name, self.narrow, kind, tuple(tokens), digest(experts)

    def skeleton(self) -> Any:
        """Make transformers' model without weights; its layers are taken out and run one by one."""
        ours = self.checkpoint.config
        options = {"attn_implementation": "eager" if ours.attention_cap is not None or ours.sinks else "sdpa"}
        if any(kind.experts for kind in ours.kinds) and int(transformers.__version__.split(".")[0]) >= WITH_GROUPED:
            options["experts_implementation"] = "eager"  # the other one has no float64
        with without_weights():
            model = transformers.AutoModel.from_config(
                config_of(self.checkpoint), trust_remote_code=False, **options
            ).eval()
        self._layers = model.layers
        model.norm, self._norm = nn.Identity(), model.norm
        return model

    def _start(
        self, model: Any, kind: torch.dtype, tokens: list[int], experts: Tensor | None, router: Router
    ) -> Recorder:  # fmt: skip
        """Embed a sequence and record the arguments of each layer: mask, positions, rotary tables, its inputs."""
        recorder = Recorder(self.tapped(kind, tokens, experts), router)
        if self.checkpoint.config.layer_input is not None:
            self._give_layer_inputs(model, kind, tokens)
        self.record(model, recorder, self.embed(tokens).to(kind))
        return recorder

    def record(self, model: Any, recorder: Recorder, embedded_TH: Tensor) -> None:
        """Run transformers' model over embeddings, whose layers only record their arguments."""
        model.layers = nn.ModuleList([Recording(recorder, layer) for layer in self._layers])
        model.embed_tokens.padding_idx = None
        model.embed_tokens.weight = nn.Parameter(embedded_TH)  # transformers scales it, or not
        model(input_ids=torch.arange(len(embedded_TH))[None], use_cache=False)
        for options in recorder.options:
            options[next(name for name in CACHE_NAMES if name in options)] = recorder.cache

    def embed(self, tokens: list[int]) -> Tensor:
        """Return embeddings [T, H] in the recipe's dtype."""
        return self._rows_of(EMBEDDING, self._embedding, tokens, self._embedding_narrow)

    def _rows_of(self, name: str, table: Source, tokens: list[int], narrow: str | None) -> Tensor:
        last = table.shape[0] - 1  # as the graphs do where a draft's vocabulary is padded less
        rows = (table.rows(min(t, last), min(t, last) + 1) for t in tokens)
        return torch.stack([self._read(name, row, narrow)[0] for row in rows])

    def _give_layer_inputs(self, model: Any, kind: torch.dtype, tokens: list[int]) -> None:
        """Give a model what makes the inputs of its layers, with the rows of these tokens alone."""
        rows = self._rows_of(LAYER_EMBEDDING, self._refs[LAYER_EMBEDDING], tokens, self.narrow)
        read = {name: self.read(name, self._refs[name]) for name in (INPUT_PROJECTION, OF_INPUTS)}
        for name, tensor in (read | {LAYER_EMBEDDING: rows}).items():
            module = model.get_submodule(name.removeprefix("model.").removesuffix(".weight"))
            module.weight = nn.Parameter(tensor.to(kind))
        model.embed_tokens_per_layer.padding_idx = None

    def _normed(self, runs: list[Recorder], kind: torch.dtype) -> Iterator[Tensor]:
        """Return normalised hidden states [T, H] of each sequence: the only kept result of a run."""
        self._norm.load_state_dict({"weight": self.read(NORM, self._refs[NORM]).to(kind)}, assign=True)
        for run in runs:
            yield self._norm(run.hidden)[0]

    def golden(self, high_TH: Tensor, low_TH: Tensor, caches: Tensor, caches_noise: Tensor) -> Golden:
        """Return the golden of normalised hidden states and projected caches in both precisions."""
        ids: list[Tensor] = []
        parts: tuple[list[Summary], list[Summary]] = ([], [])
        for start in range(0, len(high_TH), TOKENS_AT_ONCE):
            chosen = None
            for hidden, kept in zip((high_TH, low_TH), parts, strict=True):
                logits = self._head(hidden[start : start + TOKENS_AT_ONCE])
                if chosen is None:
                    chosen = recorded_ids(logits)
                    ids.append(chosen)
                kept.append(summary(logits, chosen))
        return Golden(torch.cat(ids), joined(parts[0]), joined(parts[1]), caches, caches_noise)

    def _head(self, hidden_TH: Tensor) -> Tensor:
        """Return logits [T, V], float64 or float32: accumulated in at least float32, as Tandem does in every dtype."""
        wide = hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
        logits = torch.cat([wide @ block.T for block in self._head_blocks(wide.dtype)], dim=-1)
        return capped(logits * self.checkpoint.config.logit_scale, self.checkpoint.config.logit_cap)

    def _head_blocks(self, kind: torch.dtype) -> Iterable[Tensor]:
        """Return the LM head as blocks of rows; a small one is kept, because every sequence needs it."""
        if kind in self._kept_head:
            return self._kept_head[kind]
        tied = self.checkpoint.config.tied
        ref = self._embedding if tied else self._refs[HEAD]
        narrow = self._embedding_narrow if tied else self.narrow
        starts = range(0, ref.shape[0], HEAD_ROWS)
        blocks = (self._read(HEAD, ref.rows(r, min(r + HEAD_ROWS, ref.shape[0])), narrow).to(kind) for r in starts)
        if math.prod(ref.shape) * kind.itemsize > KEPT_HEAD_BYTES:
            return blocks
        self._kept_head[kind] = list(blocks)
        return self._kept_head[kind]

    def read(self, name: str, ref: Source) -> Tensor:
        """Return a tensor in the recipe's dtype; for a matrix stored narrower, its dequantised values in float32."""
        return self._read(name, ref, self.narrow)

    def _read(self, name: str, ref: Source, narrow: str | None) -> Tensor:
        tensor = read_tensor(ref)
        if narrow is None or tensor.dim() != 2:
            return tensor.to(self.dtype)
        return (int4 if narrow == "int4" and takes_four_bits(name) else int8).rounded(tensor)


class Recorder:
    """A run of a sequence: its key in `Taps`, its router, hidden states and cache, and the arguments of each layer.

    `inputs` are those that a model gives by position.
    """

    def __init__(self, key: TapKey, router: Router) -> None:
        self.key, self.router = key, router
        self.hidden = torch.empty(0)
        self.cache = _ProjectedCache()
        self.inputs: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []


class Recording(nn.Module):
    """Replaces a layer and records its arguments."""

    def __init__(self, recorder: Recorder, layer: nn.Module) -> None:
        super().__init__()
        self.recorder = recorder
        if hasattr(layer, "attention_type"):  # which 4.57 asks a layer for, or its attention
            self.attention_type = layer.attention_type
        attention: Any = getattr(layer, "self_attn", None)
        if hasattr(attention, "attention_type"):
            self.self_attn = SimpleNamespace(attention_type=attention.attention_type)

    def forward(self, hidden_states: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """Record and pass on what the first layer got: some models of 4.57 take the first element of an output."""
        if not self.recorder.options:
            self.recorder.hidden = hidden_states
        self.recorder.inputs.append(inputs)
        self.recorder.options.append(options)
        return self.recorder.hidden


class _ProjectedCache:
    """A stand-in for a layer's cache: stores projections of keys and values and returns both."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store projections of keys and values, and return both. Shapes: [1, heads, T, D]."""
        self.layers.append(torch.stack([project_cache(keys[0]), project_cache(values[0])], dim=1))
        return keys, values

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """Return the state of a convolution before the sequence: none."""

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        """Return the recurrent state before the sequence: none."""

    def update_conv_state(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        """Store projections of a recurrent layer's inputs in the place of keys, and return the inputs [1, C, T]."""
        projected = project_cache(inputs.transpose(1, 2))
        self.layers.append(torch.stack([projected, torch.zeros_like(projected)], dim=1))
        return inputs

    def update_recurrent_state(self, *_: Any, **__: Any) -> None:
        """Store nothing of the state after the sequence."""

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return the tokens before the sequence: none."""
        return 0

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        """Return whether the cache keeps earlier states."""
        return False
