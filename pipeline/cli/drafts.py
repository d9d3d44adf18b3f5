"""The command line of drafts: distill, tune. A part of `cli.py`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.cli.console import Console, print_json
from pipeline.cli.options import Command, artifact_dir, as_json, policy_of, policy_option, recipe_path
from pipeline.errors import InputError
from pipeline.files.atomic import write_atomic
from pipeline.models.draft_kind import DraftMethod


def add_to(main: click.Group) -> None:
    """Add the commands."""
    for command in (distill, tune):
        main.add_command(command)


@click.command(cls=Command)
@click.argument("recipe")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the draft (default: drafts/NAME-METHOD beside it)."
)
@click.option(
    "--method",
    type=click.Choice(["eagle3", "draft_model"]),
    default="eagle3",
    show_default=True,
    help="A head over the target's hidden states, or a model of some of its layers.",
)
@click.option("--layers", help="Layers that a draft model starts from, like 0,1,29 (default: the first two, the last).")
@click.option(
    "--start", type=click.Path(path_type=Path, exists=True), help="Folder of a draft to train further (default: none)."
)
@click.option(
    "--start-share",
    type=click.FloatRange(0, 1),
    help="How much of --start stays: less, the more new text there is (default: 0.5).",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=1_000_000, show_default=True, help="Answer tokens to learn from."
)
@click.option("--steps", type=click.IntRange(1), default=4000, show_default=True, help="Steps of training.")
@click.option(
    "--draft-vocab",
    type=click.IntRange(32),
    help="Tokens it may propose; with --start, they are chosen anew (default: 7680, or those of --start).",
)
@click.option(
    "--objective",
    type=click.Choice(["distribution", "token"]),
    default="distribution",
    show_default=True,
    help="What to learn: the target's distribution, or the token that it chose.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True),
    help="JSON lines with prompt (default: the target writes its own).",
)
@click.option(
    "--transcripts",
    type=click.Path(path_type=Path, exists=True),
    help="JSON lines with prompt and answer: what the target wrote before.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Folder of text that an earlier run wrote for this target, learned from as well (may be repeated).",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda.")
@click.option("--seed", default=0, show_default=True, help="Decides text and training: another seed, other text.")
@as_json
@click.pass_obj
def distill(
    console: Console, recipe: str, out: Path | None, method: DraftMethod, layers: str | None, start: Path | None,
    tokens: int, steps: int, draft_vocab: int | None, objective: str, prompts: Path | None, transcripts: Path | None,
    text: tuple[Path, ...], device: str, seed: int, start_share: float | None, json_: bool,
) -> None:  # fmt: skip
    """Train a draft for the target of RECIPE. Stopped, the same command goes on where it was."""
    from pipeline.distill.run import distill
    from pipeline.distill.settings import START_SHARE, DistillSettings
    from pipeline.recipe import load

    if start is None and start_share is not None:
        raise InputError(
            f"found {start_share} without --start", where="--start-share", fix="name a draft: --start PATH"
        )
    path = recipe_path(recipe)
    parsed = load(path)
    settings = DistillSettings(
        recipe=parsed, base=path.parent, out=out or path.parent / "drafts" / f"{parsed.name}-{method}", tokens=tokens,
        steps=steps, draft_vocab=draft_vocab, seed=seed, objective=objective, device=device, prompts=prompts,
        transcripts=transcripts, text=text, method=method, layers=_numbers(layers), start=start,
        start_share=START_SHARE if start_share is None else start_share, log=console.log,
    )  # fmt: skip
    figures = distill(settings)
    if json_:
        print_json(figures.model_dump(mode="json"))
        return
    for kind, rate in figures.tokens_per_step.items():
        click.echo(f"  {kind:<12} tokens per step (K=4): {rate:.2f}")
    click.echo(f"{settings.out}: use it in a recipe as draft.source, with speculation.method: {method}")


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise InputError(f"found {text!r}", where="--layers", fix="write numbers, like 0,1,29") from error


@click.command(cls=Command)
@click.argument("recipe")
@click.option("--artifact", help="Measure this artifact (default: artifacts/NAME).")
@click.option("--prompts", "each", type=click.IntRange(1), default=4, show_default=True, help="Prompts of each class.")
@click.option("--max-new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--write", is_flag=True, help="Put the best K, their costs and the buckets into the recipe.")
@policy_option
@as_json
@click.pass_obj
def tune(
    console: Console, recipe: str, artifact: str | None, each: int, max_new_tokens: int, write: bool,
    policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Measure acceptance and step costs of RECIPE's built artifact here, and say which K and buckets are best."""
    from pipeline.measure.tune import curve, write_recipe
    from pipeline.measure.tune import tune as measure
    from pipeline.recipe import load
    from pipeline.runtime.open import load as load_artifact
    from pipeline.validate.prompts import load_prompts, prompts_path

    path = recipe_path(recipe)
    parsed = load(path)
    prompts = load_prompts(prompts_path(parsed.validate_.prompts, path.parent))
    engine = load_artifact(artifact_dir(artifact or parsed.name), policy_of(policy_file))
    found = measure(engine, prompts, each, max_new_tokens, console.log)
    data = found.to_json()
    pages = Path("artifacts") / "tuning"
    pages.mkdir(parents=True, exist_ok=True)
    write_atomic(pages / f"{parsed.name}.html", curve(found, parsed.name).encode())
    write_atomic(pages / f"{parsed.name}.json", json.dumps(data, indent=2).encode())
    if write:
        write_recipe(path, found, paced=parsed.speculation.method == "eagle3")
    if json_:
        print_json(data)
        return
    for k, cost in found.step_costs.items():
        click.echo(f"  K={k}: a step costs {cost:.2f} plain ones")
    for kind, speeds in found.expected.items():
        best = max(speeds, key=lambda k: speeds[k])
        click.echo(f"  {kind:<12} best K={best}: {speeds[best]:.2f} times plain decode")
    for name, (now, then) in found.padding.items():
        click.echo(f"  {name} buckets {found.shapes[name]}: {then:.2f} tokens run for each there is (now {now:.2f})")
    done = "written into the recipe; build it again" if write else "--write puts them into the recipe"
    click.echo(f"draft_tokens: {data['draft_tokens']}, step_costs: {data['step_costs']} ({done})")
