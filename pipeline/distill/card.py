"""A trained draft as a folder that a recipe can name: weights, config, figures, and a card for a reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.distill.head import public_name
from pipeline.files.atomic import atomic_dir
from pipeline.models.weights import D2T
from pipeline.recipe.schema import Recipe


def write_draft(
    out: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    ids_V: Tensor,
    figures: dict[str, Any],
    recipe: Recipe,
) -> None:
    """Write the folder at once, in bfloat16; one that is there is replaced."""
    named = public_name if figures["method"] == "eagle3" else str
    tensors = {named(name): tensor.bfloat16().contiguous() for name, tensor in weights.items()}
    tensors[D2T] = (ids_V.cpu() - torch.arange(len(ids_V))).int()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(out) as work:
        (work / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (work / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
        (work / "README.md").write_text(card(figures, recipe))


def card(figures: dict[str, Any], recipe: Recipe) -> str:
    """What the draft is, what it learned from and how well it guesses."""
    data, settings = figures["data"], figures["settings"]
    depths = len(next(iter(figures["right_given_previous"].values())))
    rows = [
        f"| {kind} | " + " | ".join(f"{rate:.2f}" for rate in rates) + f" | {figures['tokens_per_step'][kind]:.2f} |"
        for kind, rates in figures["right_given_previous"].items()
    ]
    head = "| class | " + " | ".join(f"token {i + 1}" for i in range(depths)) + " | tokens a step, K=4 |"
    title, what = "An EAGLE-3 head", "One layer over the target's hidden states"
    if figures["method"] == "draft_model":
        title = "A draft model"
        layers = ", ".join(map(str, figures["layers"]))
        what = f"A model that starts from the target's layers {layers}" if layers else "A model of a few layers"
    further = (
        f"\n- Trained further from {figures['start']}, of which a share of {figures['start_share']} stays."
        if figures["start"]
        else ""
    )
    return f"""# {title} for {recipe.target.source}

{what}; proposes from {settings["draft_vocab"]} tokens (`d2t`), shares the target's
embedding. Made by `tandem distill`.

- Data: {data["sequences"]} conversations that the target wrote, {data["greedy"]} of them greedily, with
  {data["answer_tokens"]} tokens of answers. The prompts of the recipe's gates were kept out.
- Training: {settings["steps"]} steps of {settings["batch_tokens"]} tokens, {settings["depths"]} drafted tokens in a row
  at the end; objective: {settings["objective"]}; seed {settings["seed"]}.{further}

Draft tokens that the target takes, given that it took those before, on its greedy answers to the prompts of the
recipe's gates, over all positions. The tokens a step that follow from them are an upper estimate: steps begin where a
draft failed, which is where text is hard.

{head}
|{" --- |" * (depths + 2)}
{chr(10).join(rows)}
"""
