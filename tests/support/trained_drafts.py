"""Tiny drafts of every kind that reads the target's states, trained on the answers that the gates ask for.

An untrained draft is never accepted, so that a fault in how it proposes changes nothing that a gate sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.distill.head import head_config, initial, parallel_config, public_name
from pipeline.distill.train import InitialDraft, TargetTables, Trainer, TrainingSettings
from pipeline.models.eagle3 import fitted, opened_config, read_config, tensor_name
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD, NORM
from pipeline.progress import no_log
from pipeline.runtime.text import Text
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.speculation import block_chains, chains
from pipeline.validate.draft.target import answer
from support.heads import SIZES
from support.parallel_drafts import dflash_tensors
from support.trained_head import conversations, write_target

LAYERS, TAPS, DRAFT_VOCAB, NEW_TOKENS, DEPTHS = 4, (1, 2, 3), 256, 24, 3
STEPS = {"eagle3": 150, "p_eagle": 250, "dflash": 400}
DFLASH: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash", "draft_vocab_size": DRAFT_VOCAB,
    "aux_hidden_state_layer_ids": list(TAPS), "mask_token_id": 2, "block_size": 8, "sample_from_anchor": False,
    "sliding_window_non_causal": False, "target_hidden_size": None,
    "transformer_layer_config": {
        "model_type": "qwen3", **SIZES, "num_hidden_layers": 2, "sliding_window": 128, "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
"""A draft with a causal layer and one that is not."""


def write_trained(
    root: Path, method: str, texts: Sequence[str], steps: int | None = None, name: str | None = None
) -> Path:  # fmt: skip
    """Write `root/target`, unless it is there, and a draft for it into `root/<name>`; return that folder.

    `steps` None: as many as make it right nearly always. `name` None: the method's.
    """
    cache = root / "cache"
    folder = root / "target"
    target = resolve(str(folder), base=root, cache=cache) if folder.is_dir() else write_target(folder, cache, LAYERS)
    prompts = [Text(folder).encode_prompt(text) for text in texts]
    groups = answer(target, prompts, NEW_TOKENS, TAPS, "float32")
    text = [conversation for group in groups for conversation in conversations(group, TAPS)]
    counts = torch.bincount(torch.cat([c.tokens.long() for c in text]), minlength=target.config.vocab)
    ids = counts.topk(DRAFT_VOCAB).indices.sort().values
    embedding = read_tensor(weights(target)[EMBEDDING]).float()
    draft, config_json, name_of = _initial(method, target, ids, embedding)
    settings = TrainingSettings(
        steps=STEPS[method] if steps is None else steps,
        batch_tokens=512,
        rate=3e-3,
        warmup=10,
        depths=DEPTHS,
        single=0.0,
        bfloat16=False,
    )
    trainer = Trainer(
        draft, TargetTables(embedding, embedding[ids], ids), settings, root / f"{name or method}-work", no_log
    )
    trainer.train(text, [])
    out = root / (name or method)
    out.mkdir()
    tensors = {name_of(name): tensor.contiguous() for name, tensor in trainer.export().items()}
    save_file(tensors | {D2T: ids - torch.arange(len(ids))}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_json))
    return out


def _initial(
    method: str, target: Checkpoint, ids: Tensor, embedding: Tensor
) -> tuple[InitialDraft, dict[str, Any], Callable[[str], str]]:
    """Return a draft before its training, its `config.json`, and the names of its tensors in files."""
    if method == "dflash":
        return _block(target, ids, embedding)
    layers = (LAYERS - 2, LAYERS - 1) if method == "p_eagle" else ()
    config_json = parallel_config(target, DRAFT_VOCAB, TAPS, 2) if layers else head_config(target, DRAFT_VOCAB, TAPS)
    config = read_config(config_json, method)
    start = initial(target, config, ids, 0, layers)
    return InitialDraft(chains.guesses, config, start), config_json, public_name


def _block(
    target: Checkpoint, ids: Tensor, embedding: Tensor
) -> tuple[InitialDraft, dict[str, Any], Callable[[str], str]]:
    """Return the same of a DFlash draft, with the target's last norm and rows of its LM head."""
    drawn = dflash_tensors(taps=len(TAPS), draft_vocab=DRAFT_VOCAB)
    shapes = {name: tuple(tensor.shape) for name, tensor in drawn.items()}
    config = fitted(target.config, config_of(opened_config(DFLASH, shapes, {}), "dflash"), "dflash")
    names = {tensor_name(name): name for name in drawn if name not in ("d2t", "t2d")}
    start = {name: drawn[public] for name, public in names.items()}
    start |= {HEAD: embedding[ids], NORM: read_tensor(weights(target)[NORM]).float()}
    return InitialDraft(block_chains.guesses, config, start), DFLASH, lambda name: names[name]
