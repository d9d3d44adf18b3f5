"""The reference of a DFlash draft: transformers' target gives the states, the draft itself is written out here.

transformers has no such draft, so these are the paper's layers (arXiv 2602.06036) over a whole sequence at once, apart
from the graphs' own: no cache, no buckets. After each token stands the first answer of a block of that token and one
mask.

Shapes: T tokens, H hidden, N query heads, G KV heads, D head size.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.weights import EMBEDDING, HEAD, MARKOV, MARKOV_GATES, MARKOV_W1, MARKOV_W2
from pipeline.sources.weights import FLOATS
from pipeline.validate.reference.eagle3 import LAYER, Eagle3Reference, linear
from pipeline.validate.reference.golden import project_cache


class DFlashReference(Eagle3Reference):
    """A DFlash draft over transformers' target, in two precisions."""

    def _head_states(self, tokens: list[int], taps_TX: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the LM head's input at the mask after each token [T, H], and projections of keys and values."""
        floats = ((n, ref) for n, ref in self._refs.items() if n not in (EMBEDDING, HEAD) and ref.dtype in FLOATS)
        w = {name: self.read(name, ref).to(kind) for name, ref in floats}
        config, head = self.checkpoint.config, self.checkpoint.config.eagle3
        assert head is not None
        assert head.mask_token is not None
        context_TH = self._norm_of(taps_TX @ w["fc.weight"].T, w["hidden_norm.weight"])
        mask_TH = self.embed([head.mask_token]).to(kind).expand(len(tokens), -1)
        x_2TH = torch.stack((self.embed(tokens).to(kind), mask_TH))
        caches = []
        for layer in range(config.layers):
            own = {n.removeprefix(LAYER.format(layer)): t for n, t in w.items() if n.startswith(LAYER.format(layer))}
            normed = self._norm_of(x_2TH, own["input_layernorm.weight"])
            out, cache = self._block_attention(normed, context_TH, own, causal=layer in head.causal_layers)
            caches.append(cache)
            x_2TH = x_2TH + out
            normed = self._norm_of(x_2TH, own["post_attention_layernorm.weight"])
            gate, up = (linear(normed, own, f"mlp.{name}_proj") for name in ("gate", "up"))
            x_2TH = x_2TH + linear(functional.silu(gate) * up, own, "mlp.down_proj")
        answers_TH = x_2TH[0 if head.from_anchor else 1]
        return self._norm_of(answers_TH, w["model.norm.weight"]), torch.stack(caches, dim=1)

    def _block_attention(
        self, block_2TH: Tensor, context_TH: Tensor, w: dict[str, Tensor], *, causal: bool
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return attention of all blocks, [2, T, H]: over the context before their token and their own positions."""
        c, size = self.checkpoint.config, len(context_TH)
        k_GTD, v_GTD = self._turned_heads(context_TH, w, "k", 0), self._turned_heads(context_TH, w, "v", None)
        own = [
            [self._turned_heads(block_2TH[slot], w, name, slot if name != "v" else None) for name in "qkv"]
            for slot in range(2)
        ]
        before_TT = torch.ones(size, size, dtype=torch.bool).tril(-1)
        repeat, out = c.heads // c.kv_heads, []
        for slot in range(2):
            q_NTD = own[slot][0]
            scores = [(q_NTD @ k_GTD.repeat_interleave(repeat, 0).mT).masked_fill(~before_TT, -torch.inf)]
            seen = range(slot + 1) if causal else range(2)
            scores += [(q_NTD * own[other][1].repeat_interleave(repeat, 0)).sum(-1, keepdim=True) for other in seen]
            shares = torch.softmax(torch.cat(scores, dim=-1) * c.head_dim**-0.5, dim=-1)
            mixed_NTD = shares[..., :size] @ v_GTD.repeat_interleave(repeat, 0)
            for place, other in enumerate(seen):
                mixed_NTD = mixed_NTD + shares[..., size + place, None] * own[other][2].repeat_interleave(repeat, 0)
            out.append(linear(mixed_NTD.transpose(0, 1).reshape(size, -1), w, "self_attn.o_proj"))
        return torch.stack(out), torch.stack([project_cache(k_GTD), project_cache(v_GTD)], dim=1)

    def _turned_heads(self, x_TH: Tensor, w: dict[str, Tensor], name: str, first: int | None) -> Tensor:
        """Return heads of q, k or v, [N, T, D], q and k normalised and turned from position `first` on."""
        c, size = self.checkpoint.config, len(x_TH)
        out_NTD = linear(x_TH, w, f"self_attn.{name}_proj").view(size, -1, c.head_dim).transpose(0, 1)
        if first is None:
            return out_NTD
        norm = w.get(f"self_attn.{name}_norm.weight")
        out_NTD = out_NTD if norm is None else self._norm_of(out_NTD, norm)
        cos, sin = (table[0] for table in self._rotary(x_TH[None], torch.arange(first, first + size)[None]))
        left, right = out_NTD.chunk(2, dim=-1)
        return out_NTD * cos + torch.cat((-right, left), dim=-1) * sin


class DSparkReference(DFlashReference):
    """A DSpark draft: a DFlash draft whose logits have a bias by the token before.

    The bias is a product too, so the states of its Markov head, [T, R], stand beside the LM head's input.
    """

    def _head_states(self, tokens: list[int], taps_TX: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden_TH, caches = super()._head_states(tokens, taps_TX, kind)
        head = self.checkpoint.config.eagle3
        assert head is not None
        assert head.markov is not None
        w = {name: self.read(name, self._refs[name]).to(kind) for name in self._refs if name.startswith(MARKOV)}
        embedded_TR = w[MARKOV_W1][torch.tensor(tokens)]
        gates = MARKOV_GATES.get(head.markov.kind, "")
        if head.markov.kind == "gated":
            gate_TR = torch.sigmoid(linear(torch.cat((hidden_TH, embedded_TR), dim=-1), w, gates))
            return torch.cat((hidden_TH, gate_TR * embedded_TR), dim=-1), caches
        if head.markov.kind == "rnn":  # its third part is the output, and a block begins with a state of zeros
            read_TX = torch.cat((torch.zeros_like(embedded_TR), embedded_TR, hidden_TH), dim=-1)
            embedded_TR = torch.tanh(linear(read_TX, w, gates).chunk(3, dim=-1)[2])
        return torch.cat((hidden_TH, embedded_TR), dim=-1), caches

    def _head(self, hidden_TH: Tensor) -> Tensor:
        size = self.checkpoint.config.hidden
        base_TV = super()._head(hidden_TH[:, :size])
        return base_TV + hidden_TH[:, size:].to(base_TV.dtype) @ self._bias_rows.to(base_TV.dtype).T

    @cached_property
    def _bias_rows(self) -> Tensor:
        return self.read(MARKOV_W2, self._refs[MARKOV_W2])
