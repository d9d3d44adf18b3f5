"""Which heads are refused: the shipped one, shuffled, one layer off, with wrong switches, trained for a short time.

    python benchmarks/faulty_heads.py [RECIPE] [--half FOLDER] [--prompts N] [--only WORDS]

Each head goes through the short form of `tandem draft doctor`, which a build runs before it compiles and whose verdict
the acceptance gate holds, then through what that gate measures: its answers come from eager graphs in float32, in one
row, to N of the recipe's prompts. `--half` is a head that was trained for a short time:
tandem distill RECIPE --out FOLDER --steps 60 --tokens 8000
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pipeline.cache.local import Cache, default_root
from pipeline.memory import host_memory
from pipeline.models.weights import HEAD
from pipeline.progress import no_log
from pipeline.recipe import load
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.validate.draft.examine import SHORT, chosen, examine, usable_dtype
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.draft.short import is_refused
from pipeline.validate.gates.acceptance import acceptance, acceptance_of
from pipeline.validate.gates.answers import answer_prompts, sequences_of
from pipeline.validate.gates.inputs import GateInputs, StageClock
from pipeline.validate.gates.references import goldens_of
from pipeline.validate.gates.run import expected_acceptance
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import recipe_prompts
from pipeline.validate.report.schema import Acceptance
from support.eager import make_engine

IDS = "eagle_aux_hidden_state_layer_ids"
SHAPES = {"batch": (1,), "prefill": (64,), "kv": (512,)}

Pair = tuple[Checkpoint, Checkpoint]


def main() -> None:
    """Print a row for each head, then the findings of the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/smollm2-135m-spec.yaml"))
    parser.add_argument("--half", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--only", default="", help="heads whose name has these words")
    arguments = parser.parse_args()
    recipe, base = load(arguments.recipe), arguments.recipe.parent
    shipped = base / str(recipe.draft.source)
    taps = _taps(recipe, base)
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
    print("head | right drafts, place 1 to 3 | doctor | build | tokens per step of the gate, by K | gate")
    for name, (source, change) in heads.items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as work:
            head = shutil.copytree(source, Path(work) / "head")
            change(head)
            changed = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"source": str(head)})})
            pair = resolve_pair(changed, base=base, cache=default_root() / "sources")
            report = _examined(changed, pair, base)
            measured, findings = _gated(changed, pair, base, arguments.prompts, Path(work))
        places = " ".join(f"{rate:.3f}" for rate in report.current.by_place)
        build = "refused" if is_refused(report, needs_acceptance=recipe.floor > 1) else "goes on"
        verdict = report.verdict + (f" ({report.setting})" if report.setting else "")
        steps = ", ".join(f"K={of.draft_tokens}: {of.tokens_per_step:.2f}" for of in measured)
        gate = "; ".join(findings) or "passed"
        print(f"{name} | {places} | {verdict} | {build} | {steps} | {gate}", flush=True)


def _examined(recipe: Recipe, pair: Pair, base: Path) -> DraftReport:
    """Return the doctor's short report on a head."""
    prompts = encoded_prompts(chosen(recipe_prompts(recipe, base), SHORT.prompts), tokenizer_files(pair[0]))
    dtype = usable_dtype(pair[0], recipe.target.dtype, host_memory().available)
    assert dtype is not None, "the target does not fit the memory"
    return examine(recipe, pair, prompts, dtype, SHORT)


def _gated(
    recipe: Recipe, pair: Pair, base: Path, count: int, work: Path
) -> tuple[list[Acceptance], tuple[str, ...]]:  # fmt: skip
    """Return the acceptance with each K, and the findings of the gate with the recipe's limits."""
    content = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    content["shapes"] = SHAPES
    content["target"]["dtype"] = "float32"
    content["draft"].pop("weights", None)
    content["speculation"]["sampling"] = ["greedy"]
    content["speculation"].pop("step_costs", None)  # of other shapes and another dtype
    eager = Recipe.model_validate_json(json.dumps(content))
    prompts = chosen(recipe_prompts(recipe, base), count)
    inputs = GateInputs(make_engine(eager, pair), eager, prompts, pair, Cache(work, "goldens"), no_log)
    answers = answer_prompts(inputs, StageClock(no_log))
    sequences = replace(sequences_of(inputs, answers), probes=())
    expected = expected_acceptance(inputs, answers, sequences, goldens_of(inputs, "draft", sequences))
    by_k = [acceptance_of(prompts, of, steps) for steps, of in answers.speculative.items()]
    speed = None  # has no limit, and is not measured here
    return by_k, acceptance(by_k, speed, recipe.validate_.gates, expected).findings  # type: ignore[arg-type]


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
