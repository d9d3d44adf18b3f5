"""The reference of EAGLE-3 and P-EAGLE heads: transformers' target gives the features, the head is written out here.

transformers has no such head, so this is the paper's layer (Li et al. 2025) over a whole sequence at once, apart from
the graphs' own: no cache, no buckets, no shared code but the rotary tables of transformers. Of a P-EAGLE head it is the
first draft token; masked positions are not part of it.

Shapes: T tokens, H hidden, N query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pipeline.models.config import Eagle3
from pipeline.models.rope import in_both_layouts
from pipeline.models.weights import EMBEDDING, HEAD
from pipeline.sources.weights import FLOATS
from pipeline.validate.reference.golden import Golden, project_cache
from pipeline.validate.reference.layers import Reference, Taps

LAYER = "model.layers.{}."
FIRST = LAYER.format(0)


class Eagle3Reference(Reference):
    """A head over transformers' target, in two precisions.

    The logits at a token are those that follow it, as of any model; at a sequence's first token, which has no features
    before it, they are zeros.
    """

    @cached_property
    def _target(self) -> Reference:
        taps = self.taps or Taps.of(self.target.config, self.checkpoint.config)
        return Reference(self.target, self.target, self.dtype_name, self.target_narrow, taps=taps)

    @cached_property
    def _rotary(self) -> LlamaRotaryEmbedding:
        named = in_both_layouts(self.checkpoint.config_json, self.checkpoint.config.max_position)
        fields = {k: v for k, v in named.items() if k != "model_type"}
        return LlamaRotaryEmbedding(config=LlamaConfig(**fields))

    @property
    def layers(self) -> int:
        """The target's layers, and those of the head."""
        return self._target.layers + self.checkpoint.config.layers

    @torch.no_grad()
    def goldens(self, sequences: list[list[int]], experts: Sequence[Tensor | None] = ()) -> Iterator[Golden]:
        """Run the target over the sequences whose taps are not known, then the head over each.

        `experts` are those of the target.
        """
        assert self._target.taps is not None
        states, key = self._target.taps.states, self._target.tapped
        runs = list(zip(sequences, list(experts) or [None] * len(sequences), strict=True))
        if unknown := [run for run in runs if any(key(kind, *run) not in states for kind in self.kinds)]:
            self._target.run_layers([tokens for tokens, _ in unknown], [given for _, given in unknown])
        for tokens, given in runs:
            features = (torch.cat(states[key(kind, tokens, given)], dim=-1) for kind in self.kinds)
            (high, keys), (low, keys_noise) = (
                self._head_states(tokens, taps_TX, kind) for taps_TX, kind in zip(features, self.kinds, strict=True)
            )
            routes = self._target.taps.routes[key(self.dtype, tokens, given)]
            yield replace(self.golden(high, low, keys, keys_noise), routes=routes)

    def _head_states(self, tokens: list[int], taps_TX: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the input of the head's LM head at each token [T, H], and projections of its keys and values."""
        floats = ((n, ref) for n, ref in self._refs.items() if n not in (EMBEDDING, HEAD) and ref.dtype in FLOATS)
        w = {name: self.read(name, ref).to(kind) for name, ref in floats}
        head = self.checkpoint.config.eagle3
        assert head is not None
        features_TH = self._features(taps_TX[:-1], w, head)
        embedded_TH = self.embed(tokens[1:]).to(kind)
        normed_TH = self._norm_of(features_TH, w[f"{FIRST}hidden_norm.weight"]) if head.hidden_norm else features_TH
        x = normed_TH if head.norm_before_residual else features_TH
        read = torch.cat((self._norm_of(embedded_TH, w[f"{FIRST}input_layernorm.weight"]), normed_TH), dim=-1)
        caches = []
        for layer in range(self.checkpoint.config.layers):
            own = {n.removeprefix(LAYER.format(layer)): t for n, t in w.items() if n.startswith(LAYER.format(layer))}
            read = self._norm_of(x, own["input_layernorm.weight"]) if layer else read
            out, cache = self._attention(read, own)
            caches.append(cache)
            x = x + out
            normed_TH = self._norm_of(x, own["post_attention_layernorm.weight"])
            gate, up = (linear(normed_TH, own, f"mlp.{name}_proj") for name in ("gate", "up"))
            x = x + linear(functional.silu(gate) * up, own, "mlp.down_proj")
        last_TH = self._norm_of(x, w["model.norm.weight"])
        return torch.cat((last_TH.new_zeros(1, last_TH.shape[1]), last_TH)), torch.stack(caches, dim=1)

    def _features(self, taps_TX: Tensor, w: dict[str, Tensor], head: Eagle3) -> Tensor:
        """Return the features of the target's states, [T, H]."""
        if head.reads_output:
            return taps_TX
        if head.norm_before_fc:
            taps_TX = self._norm_of(taps_TX, w["input_norm.weight"])
        if head.fc_norm:
            parts = enumerate(taps_TX.split(head.target_hidden, dim=-1))
            taps_TX = torch.cat([self._norm_of(part, w[f"fc_norm.{tap}.weight"]) for tap, part in parts], dim=-1)
        return taps_TX @ w["fc.weight"].T

    def _attention(self, both_TX: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        c, size = self.checkpoint.config, len(both_TX)

        def heads(name: str, count: int) -> Tensor:
            out = linear(both_TX, w, f"self_attn.{name}_proj").view(size, count, c.head_dim)
            norm = w.get(f"self_attn.{name}_norm.weight")
            return (out if norm is None else self._norm_of(out, norm)).transpose(0, 1)

        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        cos, sin = (table[0] for table in self._rotary(both_TX[None], torch.arange(size)[None]))

        def turn(x_NTD: Tensor) -> Tensor:
            first, second = x_NTD.chunk(2, dim=-1)
            return x_NTD * cos + torch.cat((-second, first), dim=-1) * sin

        q, k = turn(q), turn(k)
        repeat = c.heads // c.kv_heads
        out = functional.scaled_dot_product_attention(
            q[None], k.repeat_interleave(repeat, 0)[None], v.repeat_interleave(repeat, 0)[None], is_causal=True
        )[0]
        out_TX = out.transpose(0, 1).reshape(size, c.heads * c.head_dim)
        caches = torch.stack([project_cache(k), project_cache(v)], dim=1)
        return linear(out_TX, w, "self_attn.o_proj"), caches

    def _norm_of(self, x: Tensor, weight_H: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.checkpoint.config.norm_eps)
        return weight_H * wide.to(x.dtype)


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """Apply a linear layer with an optional bias."""
    out, bias = x @ w[f"{name}.weight"].T, w.get(f"{name}.bias")
    return out if bias is None else out + bias
