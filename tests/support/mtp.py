"""Targets with an MTP module in their files, and what it answers by whole models of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support import families

MODULES = {"qwen3-next": "Qwen3Next", "qwen3.5": "Qwen3_5", "qwen3.5-moe": "Qwen3_5Moe"}
DRAFT = {"derive": {"from": "target", "mtp": True}}


def write_target(family: str, root: Path, **fields: Any) -> Path:
    """Write `root / "target"` with a random module: its layer as transformers saves one of a model of one layer."""
    spec = families.FAMILIES[family]
    families.write_pair(spec, root)
    one = spec.changes | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    alone = families.random_model(spec, one, seed=5)
    alone.save_pretrained(root / "alone")
    with safe_open(root / "alone" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    kept = {name: t for name, t in stored.items() if name.startswith(("model.layers.", "model.norm."))}
    module = {name.replace("model.", "mtp.", 1): tensor for name, tensor in kept.items()}
    hidden = alone.config.hidden_size
    generator = torch.Generator().manual_seed(6)
    module["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * 0.1
    for name in ("embedding", "hidden"):
        module[f"mtp.pre_fc_norm_{name}.weight"] = torch.randn(hidden, generator=generator) * 0.2
    target = root / "target"
    save_file(module, target / "mtp.safetensors", {"format": "pt"})
    index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"] |= dict.fromkeys(module, "mtp.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return target


class Description:
    """A module over its target, both whole models of transformers, without caches."""

    def __init__(self, family: str, root: Path) -> None:
        kind = getattr(transformers, f"{MODULES[family]}ForCausalLM")
        self.target, self.alone = (kind.from_pretrained(root / name).eval().float() for name in ("target", "alone"))
        with safe_open(root / "target" / "mtp.safetensors", "pt") as file:
            self.fc, *self.norms = (
                file.get_tensor(f"mtp.{name}.weight") for name in ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
            )

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """Logits after each token but the first, float32 [T - 1, V]."""
        out: Tensor = self.target.lm_head(self._run(self._read(tokens)))[0]
        return out

    @torch.no_grad()
    def proposals(self, text: list[int], steps: int, copied: Sequence[int] = ()) -> list[int]:
        """The tokens that a step proposes after a text; `copied` ones are given."""
        read, drafts = self._read(text), list[int]()
        for step in range(steps):
            last = self._run(read)[:, -1:]
            drafts.append(copied[step] if step < len(copied) else int(self.target.lm_head(last).argmax()))
            read = torch.cat((read, self._joined(drafts[-1:], last)), dim=1)
        return drafts

    def _read(self, tokens: list[int]) -> Tensor:
        states = self.target.model(input_ids=torch.tensor([tokens])).last_hidden_state
        return self._joined(tokens[1:], states[:, :-1])

    def _joined(self, tokens: Sequence[int], states: Tensor) -> Tensor:
        read, eps = (
            (self.target.model.embed_tokens(torch.tensor([list(tokens)])), states),
            self.target.config.rms_norm_eps,
        )
        both = [
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + w)
            for x, w in zip(read, self.norms, strict=True)
        ]
        return torch.cat(both, dim=-1) @ self.fc.T

    def _run(self, read: Tensor) -> Tensor:
        out: Tensor = self.alone.model(inputs_embeds=read).last_hidden_state
        return out
