"""A trained draft as a folder that a recipe can use: weights, config, figures, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.distill.figures import DraftFigures
from pipeline.distill.head import block_name, public_name
from pipeline.files.atomic import atomic_dir
from pipeline.models.draft_kind import DRAFT_KINDS, DraftMethod
from pipeline.models.eagle3_writers import NESTED
from pipeline.models.weights import D2T, MASK_HIDDEN
from pipeline.recipe.schema import Recipe
from pipeline.sources.heads import T2D


def write_draft(
    out: Path, config: dict[str, Any], weights: dict[str, Tensor], ids_V: Tensor, figures: DraftFigures, recipe: Recipe
) -> None:
    """Write the folder atomically, with weights in bfloat16; replace an existing draft."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(out) as work:
        write_files(work, config, weights, ids_V, figures.method)
        (work / "training.json").write_text(figures.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (work / "README.md").write_text(card(figures, recipe), encoding="utf-8")


def write_files(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], ids_V: Tensor, method: DraftMethod
) -> None:  # fmt: skip
    """Write `config.json` and the weights of a draft over the target's ids `ids_V`, under public names."""
    kind = DRAFT_KINDS[method]
    file_name = block_name if kind.blocks else public_name if kind.reads_target_states else str
    tensors = {file_name(name): tensor.bfloat16().contiguous() for name, tensor in weights.items()}
    if MASK_HIDDEN in tensors:
        tensors[MASK_HIDDEN] = tensors[MASK_HIDDEN].view(1, 1, -1)
    tensors[D2T] = ids_V.cpu() - torch.arange(len(ids_V))  # int64, as other servers read it
    if kind.blocks:  # speculators needs both maps
        kept = torch.zeros(config[NESTED]["vocab_size"], dtype=torch.bool)
        kept[ids_V.cpu()] = True
        tensors[T2D] = kept
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def card(figures: DraftFigures, recipe: Recipe) -> str:
    """Return the model card: what the draft is, its data and training, and its accuracy."""
    data, settings = figures.data, figures.settings
    depths = len(next(iter(figures.right_given_previous.values())))
    rows = [
        f"| {kind} | " + " | ".join(f"{rate:.2f}" for rate in rates) + f" | {figures.tokens_per_step[kind]:.2f} |"
        for kind, rates in figures.right_given_previous.items()
    ]
    head = "| class | " + " | ".join(f"token {i + 1}" for i in range(depths)) + " | tokens per step (K=4) |"
    title, what = _kind(figures)
    further = (
        f"\n- Trained further from {figures.start}, whose share of the weights is {figures.start_share}."
        if figures.start
        else ""
    )
    return f"""# {title} for {recipe.target.source}

{what}; proposes from {settings.draft_vocab} tokens (`d2t`), uses the target's
embedding. Created by `tandem distill`.

- Data: {data.sequences} conversations that the target wrote, {data.greedy} of them greedily, with
  {data.answer_tokens} answer tokens. The prompts of the recipe's gates are not part of it.
- Training: {settings.steps} steps of {settings.batch_tokens} tokens, {settings.depths} drafted tokens in a row
  at the end; objective: {settings.objective}; seed {settings.seed}.{further}

Chance that the target accepts a draft token, given that it accepted those before, over all positions of its greedy
answers to the prompts of the recipe's gates. The tokens per step that follow from it are an upper estimate, because
steps begin after a rejected token, where the text is harder to predict.

{head}
|{" --- |" * (depths + 2)}
{chr(10).join(rows)}
"""


def _kind(figures: DraftFigures) -> tuple[str, str]:
    """Return the title of a kind of draft, and what such a draft is."""
    layers = ", ".join(map(str, figures.layers))
    if figures.method == "draft_model":
        started = f"A model that starts from the target's layers {layers}"
        return "A draft model", started if layers else "A model of a few layers"
    if figures.method == "p_eagle":
        from_ = f" that start from its layers {layers}" if layers else ""
        if layers and figures.start:
            from_ = f": the first one is that of {figures.start}, the others start from the target's layers {layers}"
        return "A P-EAGLE head", f"Layers over the target's hidden states{from_}; all tokens of a step in one pass"
    if figures.method == "dflash":
        started = f"Layers that start from the target's layers {layers}"
        return "A DFlash draft", f"{started}, over its hidden states; they denoise a block of tokens in one pass"
    return "An EAGLE-3 head", "One layer over the target's hidden states"
