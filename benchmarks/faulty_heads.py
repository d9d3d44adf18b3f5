"""Which heads are refused: the shipped one, shuffled, one layer off, with wrong switches, trained for a short time.

    python benchmarks/faulty_heads.py [RECIPE] [--half FOLDER]

Each head goes through the short form of `tandem draft doctor`, which a build runs before it compiles. `--half` is a
head that was trained for a short time: tandem distill RECIPE --out FOLDER --steps 60 --text FILE
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.cache.local import default_root
from pipeline.models.weights import HEAD
from pipeline.recipe import load
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.stages.memory import host_memory
from pipeline.validate.draft.examine import SHORT, chosen, examine, usable_dtype
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import recipe_prompts

IDS = "eagle_aux_hidden_state_layer_ids"


def main() -> None:
    """Print a row for each head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/smollm2-135m-spec.yaml"))
    parser.add_argument("--half", type=Path)
    arguments = parser.parse_args()
    recipe = load(arguments.recipe)
    shipped = arguments.recipe.parent / str(recipe.draft.source)
    taps = _taps(recipe, arguments.recipe.parent)
    heads: dict[str, tuple[Path, Callable[[Path], None]]] = {
        "as shipped": (shipped, _keep),
        "rows of the LM head shuffled": (shipped, _shuffle),
        "taps one layer higher": (shipped, lambda folder: _write(folder, **{IDS: [tap + 1 for tap in taps]})),
        "taps one layer lower": (shipped, lambda folder: _write(folder, **{IDS: [tap - 1 for tap in taps]})),
        "norm_before_residual: true": (shipped, lambda folder: _write(folder, norm_before_residual=True)),
        "norm_output: true": (shipped, lambda folder: _write(folder, norm_output=True)),
    }
    if arguments.half:
        heads["trained for a short time"] = (arguments.half, _keep)
    print(f"{'head':<30} {'right drafts, place 1 to 3':<28} {'tokens/step':>11}  verdict")
    for name, (source, change) in heads.items():
        with tempfile.TemporaryDirectory() as work:
            head = shutil.copytree(source, Path(work) / "head")
            change(head)
            report = _examined(recipe, arguments.recipe.parent, head)
        places = "  ".join(f"{rate:.3f}" for rate in report.current.by_place)
        verdict = report.verdict + (f" ({report.setting})" if report.setting else "")
        print(f"{name:<30} {places:<28} {report.current.tokens_per_step:>11.2f}  {verdict}", flush=True)


def _examined(recipe: Recipe, base: Path, head: Path) -> DraftReport:
    """Return the doctor's short report on a head."""
    changed = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"source": str(head)})})
    pair = resolve_pair(changed, base=base, cache=default_root() / "sources")
    prompts = encoded_prompts(chosen(recipe_prompts(recipe, base), SHORT.prompts), tokenizer_files(pair[0]))
    dtype = usable_dtype(pair[0], recipe.target.dtype, host_memory().available)
    assert dtype is not None, "the target does not fit the memory"
    return examine(changed, pair, prompts, dtype, SHORT)


def _taps(recipe: Recipe, base: Path) -> tuple[int, ...]:
    head = resolve_pair(recipe, base=base, cache=default_root() / "sources")[1].config.eagle3
    assert head is not None, "the recipe's draft is not a head"
    return head.taps


def _write(folder: Path, **fields: object) -> None:
    """Change fields of a head's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def _keep(folder: Path) -> None:
    """Change nothing."""


def _shuffle(folder: Path) -> None:
    """Give each row of the LM head to another token."""
    weights = load_file(folder / "model.safetensors")
    order = torch.randperm(len(weights[HEAD]), generator=torch.Generator().manual_seed(0))
    save_file(weights | {HEAD: weights[HEAD][order].contiguous()}, folder / "model.safetensors")


if __name__ == "__main__":
    main()
