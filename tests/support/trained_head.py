"""A tiny target whose layers all matter, and an EAGLE-3 head that `tandem distill`'s trainer fits to it in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.distill.data import Conversation
from pipeline.distill.head import head_config, initial, public_name
from pipeline.distill.train import InitialDraft, TargetTables, Trainer, TrainingSettings
from pipeline.models.eagle3 import read_config
from pipeline.models.weights import D2T, EMBEDDING
from pipeline.progress import no_log
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.speculation import chains
from pipeline.validate.draft.target import TargetStates, answer
from support.heads import VOCAB

LAYERS, DRAFT_VOCAB, PROMPTS = 6, 256, 32
LATER = 6.0
"""Factor of the output of the later layers, which are small in `pico://llama`."""


@dataclass(frozen=True)
class Trained:
    """Folders of a target and of a head that was trained with these taps and switches."""

    target: Path
    head: Path
    taps: tuple[int, ...]


def write_target(root: Path, cache: Path, layers: int = LAYERS) -> Checkpoint:
    """Write a target and return it."""
    source = resolve(f"pico://llama?layers={layers}", base=cache, cache=cache)
    root.mkdir(parents=True)
    for file in source.root.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source.root / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            tensors[name] = tensor * LATER
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    return resolve(str(root), base=cache, cache=cache)


def prompts(count: int) -> list[list[int]]:
    """Return the first `count` of the prompts that heads are trained on, and measured on: they know the answers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB, (PROMPTS, 8), generator=generator).tolist()[:count]


def train(base: Path, steps: int = 150, **switches: Any) -> Trained:
    """Write a target and train a head for it; `switches` are fields of the head's config."""
    target = write_target(base / "target", base / "cache")
    taps = (2, LAYERS // 2, LAYERS - 2)
    groups = answer(target, prompts(PROMPTS), 24, taps, "float32")
    text = [conversation for group in groups for conversation in conversations(group, taps)]
    config_json = head_config(target, DRAFT_VOCAB, taps) | switches
    config = read_config(config_json, "head")
    counts = torch.bincount(torch.cat([c.tokens.long() for c in text]), minlength=target.config.vocab)
    ids = counts.topk(DRAFT_VOCAB).indices.sort().values
    embedding = read_tensor(weights(target)[EMBEDDING]).float()
    draft = InitialDraft(chains.guesses, config, initial(target, config, ids, 0))
    settings = TrainingSettings(steps=steps, batch_tokens=512, rate=3e-3, warmup=10, depths=2, bfloat16=False)
    trainer = Trainer(draft, TargetTables(embedding, embedding[ids], ids), settings, base / "training", no_log)
    trainer.train(text, [])
    head = base / "head"
    head.mkdir()
    tensors = {public_name(name): tensor.contiguous() for name, tensor in trainer.export().items()}
    save_file(tensors | {D2T: ids - torch.arange(len(ids))}, head / "model.safetensors", {"format": "pt"})
    (head / "config.json").write_text(json.dumps(config_json))
    return Trained(base / "target", head, taps)


def conversations(group: TargetStates, taps: tuple[int, ...]) -> list[Conversation]:
    """Return the sequences of a group as training data."""
    found = []
    for row, learn_T in enumerate(group.learn_BT):
        first, last = int(learn_T.nonzero()[0]), int(learn_T.nonzero()[-1])
        length = last + 2
        states = torch.cat([group.by_layer[tap][row, : length - 1] for tap in taps], dim=-1)
        tokens = group.tokens_BT1[row, :length].int()
        found.append(Conversation(tokens, first + 1, states.float(), group.last_BTH[row, : length - 1].float()))
    return found
