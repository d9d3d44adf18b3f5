"""Drafts that propose in one pass, from their descriptions alone: no cache, every step computed anew, in plain PyTorch.

`drive` compares an engine's proposals with them, step by step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from pipeline.graphs.arguments import PromptRow, StepRow, prefill_arguments, step_arguments
from pipeline.models.decoder import hidden_states
from pipeline.models.parallel import PLAIN, Pass, attend_up_to, plan_writes
from pipeline.models.weights import EMBEDDING
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve_pair
from pipeline.speculation import phases
from support.heads import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, P_EAGLE, SIZES, VOCAB, Parts, maps, plain_layer, write_head

DFLASH: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", **SIZES, "num_hidden_layers": 2, "block_size": 8,
    "num_target_layers": 3, "dflash_config": {"mask_token_id": 1, "target_layer_ids": [0, 2]},
}  # fmt: skip
RANK = 16
DSPARK: dict[str, Any] = DFLASH | {
    "architectures": ["DSparkDraftModel"], "block_size": 7,
    "dflash_config": {
        "mask_token_id": 1, "target_layer_ids": [0, 2], "projector_type": "dspark", "markov_rank": RANK,
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    },
}  # fmt: skip


def dspark_config(**options: Any) -> dict[str, Any]:
    """Return the config of a DSpark draft with other options."""
    return DSPARK | {"dflash_config": DSPARK["dflash_config"] | options}


def dflash_tensors(
    layers: int = 2, taps: int = 2, draft_vocab: int | None = None, markov: str | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """Return the tensors of a DFlash draft under public names; with a kind of Markov head, of a DSpark draft."""
    generator = torch.Generator().manual_seed(0)
    found = {"fc.weight": torch.randn(HIDDEN, taps * HIDDEN, generator=generator) * (taps * HIDDEN) ** -0.5}
    found |= {
        name: 1 + 0.3 * torch.randn(HIDDEN, generator=generator) for name in ("hidden_norm.weight", "norm.weight")
    }
    for layer in range(layers):
        own = plain_layer(generator)
        own |= {f"self_attn.{n}_norm.weight": 1 + 0.3 * torch.randn(HEAD_DIM, generator=generator) for n in "qk"}
        found |= {f"layers.{layer}.{name}": tensor for name, tensor in own.items()}
    if draft_vocab is not None:
        found |= {"lm_head.weight": torch.randn(draft_vocab, HIDDEN, generator=generator), **maps(draft_vocab)}
    return found | (markov_tensors(markov, draft_vocab or VOCAB, generator) if markov else {})


def markov_tensors(kind: str, draft_vocab: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors of a Markov head whose bias is as large as the logits, and of a confidence head."""
    shapes = {"markov_w1.weight": (VOCAB, RANK), "markov_w2.weight": (draft_vocab, RANK)}
    gates, read = {"vanilla": (0, 0), "gated": (RANK, HIDDEN + RANK), "rnn": (3 * RANK, 2 * RANK + HIDDEN)}[kind]
    name = "joint_proj" if kind == "rnn" else "gate_proj"
    shapes |= {f"{name}.weight": (gates, read), f"{name}.bias": (gates,)} if gates else {}
    found = {f"markov_head.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    estimate = {"weight": (1, HIDDEN + RANK), "bias": (1,)}
    return found | {f"confidence_head.proj.{n}": torch.randn(s, generator=generator) for n, s in estimate.items()}


def write_dflash(root: Path, config: dict[str, Any] = DFLASH, **parts: Any) -> Path:
    """Write a DFlash draft's folder."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config))
    save_file(dflash_tensors(**parts), root / "model.safetensors", {"format": "pt"})
    return root


def write_parallel(root: Path, method: str) -> Path:
    """Write a draft of a parallel kind for `pico://llama`."""
    if method == "dflash":
        return write_dflash(root)
    if method == "dspark":
        return write_dflash(root, DSPARK, markov="vanilla")
    parts = Parts(layer="layers.0.", layers=3, mask_hidden=True)
    return write_head(root, P_EAGLE | {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, parts)


class Description:
    """What both kinds share: the target's states, a norm, heads, attention with a mask, the LM head."""

    def __init__(self, engine: Any, pair: tuple[Checkpoint, Checkpoint]) -> None:
        tensors = engine.ranks.tensors
        self.w = {n.removeprefix("draft/"): t for n, t in tensors.items() if n.startswith("draft/")}
        self.of_target = {n.removeprefix("target/"): t for n, t in tensors.items() if n.startswith("target/")}
        self.target, self.config, self.head = pair[0].config, pair[1].config, pair[1].config.eagle3
        self.embedding = self.of_target[EMBEDDING]

    def states(self, tokens: list[int]) -> Tensor:
        """Return the tapped states of the target for a text, [T, X]."""
        state = {f"{p}.{i}": torch.zeros(1, KV_HEADS, 80, HEAD_DIM) for i in range(self.target.layers) for p in "kv"}
        positions = torch.arange(len(tokens))[None]
        writes = plan_writes(state, torch.zeros(1), positions, torch.ones(1, len(tokens), dtype=torch.bool))
        run = Pass(positions, state, writes, attend_up_to(positions))
        given = (self.target, self.of_target, PLAIN, torch.tensor([tokens]), run, self.head.taps)
        return hidden_states(*given).taps_BTX[0]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[name]

    def heads(self, x: Tensor, prefix: str, name: str, positions: Tensor | None) -> Tensor:
        """Return the heads of q, k or v, [N, T, D]: normalised where the draft does so, turned unless they are v."""
        out = x @ self.w[f"{prefix}self_attn.{name}_proj.weight"].T
        out = out.view(len(x), -1, HEAD_DIM).transpose(0, 1)
        if positions is not None:
            own = f"{prefix}self_attn.{name}_norm.weight"
            out = self.norm(out, own) if own in self.w else out
            angles = positions[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
            half = HEAD_DIM // 2
            turned = torch.cat((-out[..., half:], out[..., :half]), dim=-1)
            out = out * angles.cos().repeat(1, 2) + turned * angles.sin().repeat(1, 2)
        return out if name == "q" else out.repeat_interleave(HEADS // KV_HEADS, 0)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, prefix: str) -> Tensor:
        scores = (q @ k.transpose(1, 2)) * HEAD_DIM**-0.5
        out = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
        return out.transpose(0, 1).reshape(q.shape[1], -1) @ self.w[f"{prefix}self_attn.o_proj.weight"].T

    def mlp(self, x: Tensor, prefix: str) -> Tensor:
        inner = self.norm(x, f"{prefix}post_attention_layernorm.weight")
        gate, up = (inner @ self.w[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return (functional.silu(gate) * up) @ self.w[f"{prefix}mlp.down_proj.weight"].T

    def answers(self, x: Tensor) -> list[int]:
        best = (self.norm(x, "model.norm.weight") @ self.w["lm_head.weight"].T).argmax(-1)
        return (best + self.w["d2t"][best] if "d2t" in self.w else best).tolist()


class PEagleDescription(Description):
    """A P-EAGLE head: causal attention over the text's slots and masked ones after them."""

    def proposals(self, tokens: list[int], count: int, copied: Sequence[int] = ()) -> list[int]:
        """Return the next `count` drafts after a text."""
        masked = self.w["mask_hidden"].expand(count - 1, -1)
        x = torch.cat((self.states(tokens)[: len(tokens) - 1], masked)) @ self.w["fc.weight"].T
        read = torch.tensor(tokens[1:] + [self.head.mask_token] * (count - 1))
        positions, seen = torch.arange(len(read)), torch.ones(len(read), len(read), dtype=torch.bool).tril()
        embedded = self.norm(self.embedding[read], "model.layers.0.input_layernorm.weight")
        inputs = torch.cat((embedded, self.norm(x, "model.layers.0.hidden_norm.weight")), dim=-1)
        for layer in range(self.config.layers):
            prefix = f"model.layers.{layer}."
            inputs = self.norm(x, f"{prefix}input_layernorm.weight") if layer else inputs
            q, k = (self.heads(inputs, prefix, name, positions) for name in "qk")
            x = x + self.mixed(q, k, self.heads(inputs, prefix, "v", None), seen, prefix)
            x = x + self.mlp(x, prefix)
        return self.answers(x[-count:])


class DFlashDescription(Description):
    """A DFlash or DSpark draft: a block over keys and values of the target's states before it."""

    def proposals(self, tokens: list[int], count: int, copied: Sequence[int] = ()) -> list[int]:
        """Return the next `count` drafts after a text."""
        last, masks = len(tokens) - 1, count - self.head.from_anchor
        context = self.norm(self.states(tokens)[:last] @ self.w["fc.weight"].T, "hidden_norm.weight")
        x = self.embedding[torch.tensor([tokens[-1]] + [self.head.mask_token] * masks)]
        before, own = torch.arange(last), last + torch.arange(masks + 1)
        for layer in range(self.config.layers):
            prefix = f"model.layers.{layer}."
            seen = torch.ones(masks + 1, last + masks + 1, dtype=torch.bool)
            if layer in self.head.causal_layers:
                seen = seen.tril(last)
            inputs = self.norm(x, f"{prefix}input_layernorm.weight")
            q = self.heads(inputs, prefix, "q", own)
            k = torch.cat((self.heads(context, prefix, "k", before), self.heads(inputs, prefix, "k", own)), dim=1)
            v = torch.cat([self.heads(each, prefix, "v", None) for each in (context, inputs)], dim=1)
            x = x + self.mixed(q, k, v, seen, prefix)
            x = x + self.mlp(x, prefix)
        x = x if self.head.from_anchor else x[1:]
        return self.answers(x) if self.head.markov is None else self.linked(x, tokens[-1], copied)

    def linked(self, x: Tensor, previous: int, copied: Sequence[int]) -> list[int]:
        """Return the answers of a DSpark draft, one after the other: each follows the copied token before it."""
        w, states, found = self.w, self.norm(x, "model.norm.weight"), []
        base = states @ w.get("lm_head.weight", self.of_target.get("lm_head.weight")).T
        cell = torch.zeros(RANK)
        for place, (logits, state) in enumerate(zip(base, states, strict=True)):
            read = w["markov_head.markov_w1.weight"][previous]
            if self.head.markov.kind == "gated":
                inputs = torch.cat((state, read))
                gate = w["markov_head.gate_proj.weight"] @ inputs + w["markov_head.gate_proj.bias"]
                read = read * torch.sigmoid(gate)
            if self.head.markov.kind == "rnn":
                inputs = torch.cat((cell, read, state))
                gates = w["markov_head.joint_proj.weight"] @ inputs + w["markov_head.joint_proj.bias"]
                keep, new, out = gates.view(3, -1)
                cell = torch.sigmoid(keep) * cell + (1 - torch.sigmoid(keep)) * new.tanh()
                read = out.tanh()
            best = int((logits + w["markov_head.markov_w2.weight"] @ read).argmax())
            found.append(best + int(w["d2t"][best]) if "d2t" in w else best)
            previous = copied[place] if place < len(copied) else found[-1]
        return found


PROMPT = [5, 9, 3, 40, 2, 77, 5, 9]


def drive(engine: Any, description: Any, monkeypatch: Any, turns: int = 10) -> None:
    """Compare all proposals of every step, after steps that accepted none, some and all of them, and a decode step."""
    proposed: list[list[int]] = []
    accept = phases.accept

    def recorded(drafts_BK: Tensor, *rest: Any) -> Any:
        proposed.append(drafts_BK[0].tolist())
        return accept(drafts_BK, *rest)

    monkeypatch.setattr(phases, "accept", recorded)
    plain = engine.generate([PROMPT], max_new_tokens=40, speculate=False)[0].tokens
    engine.ranks.reset()
    specs = {(g.phase, g.draft_tokens): g for g in engine.graphs if g.phase != "score"}
    first = engine.ranks.run(specs["prefill", 0], prefill_arguments(specs["prefill", 0], [PromptRow(PROMPT, 0)], 1))
    text, counts = [*PROMPT, int(first["token"][0])], set()
    sizes = sorted(steps for _, steps in specs if steps)
    for turn in range(turns):
        steps = 0 if turn == turns // 2 else sizes[turn % len(sizes)]
        spec = specs["speculate" if steps else "decode", steps]
        known = len(text) - len(PROMPT)
        copied = plain[known : known + turn % 4][:steps]  # accepted, whatever the draft proposes
        out = engine.ranks.run(spec, step_arguments(spec, {0: StepRow(text[-1], len(text) - 1, copied=copied)}))
        if not steps:
            text.append(int(out["token"][0]))
            continue
        assert proposed[-1] == copied + description.proposals(text, steps, copied)[len(copied) :], f"step {turn}"
        count = int(out["count"][0])
        counts.add(count)
        text += out["tokens"][0, :count].tolist()
    assert text[len(PROMPT) :] == plain[: len(text) - len(PROMPT)]
    assert len(counts) > 2


def pair_of(work: Path, recipe: Any) -> tuple[Checkpoint, Checkpoint]:
    """Return the checkpoints of a recipe whose folders are in `work`."""
    return resolve_pair(recipe, base=work, cache=work / "sources")
