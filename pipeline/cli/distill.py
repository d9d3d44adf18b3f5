"""The command that trains a draft: distill. It imports torch when it is called, not for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table, Verdict
from pipeline.errors import InputError
from pipeline.models.draft_kind import DraftMethod
from pipeline.recipe import load

if TYPE_CHECKING:
    from pipeline.distill.settings import DistillSettings


@dataclass(frozen=True)
class DistillOptions:
    """The options of `tandem distill`."""

    recipe: str
    out: Path | None
    method: DraftMethod
    layers: str | None
    start: Path | None
    start_share: float | None
    tokens: int
    steps: int
    draft_vocab: int | None
    objective: str
    prompts: Path | None
    transcripts: Path | None
    text: tuple[Path, ...]
    device: str
    seed: int
    json_: bool

    def settings(self, console: Console) -> DistillSettings:
        """Return the settings of the training.

        Raises:
            InputError: options that contradict each other, or a recipe that does not load.

        """
        from pipeline.distill.settings import DistillSettings  # imports torch

        if self.start is None and self.start_share is not None:
            what = f"found {self.start_share} without --start"
            raise InputError(what, where="--start-share", fix="name a draft: --start PATH")
        path = recipe_path(self.recipe)
        recipe = load(path)
        return DistillSettings(
            recipe=recipe, base=path.parent, out=self.out or path.parent / "drafts" / f"{recipe.name}-{self.method}",
            tokens=self.tokens, steps=self.steps, draft_vocab=self.draft_vocab, seed=self.seed,
            objective=self.objective, device=self.device, prompts=self.prompts, transcripts=self.transcripts,
            text=self.text, method=self.method, layers=_numbers(self.layers), start=self.start,
            start_share=self.start_share, log=console.log,
            progress=console.rate("text", "answer tokens"),
        )  # fmt: skip


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise InputError(f"found {text!r}", where="--layers", fix="write numbers, like 0,1,29") from error


existing = click.Path(path_type=Path, exists=True)


@click.command(cls=Command)
@click.argument("recipe", shell_complete=complete_recipe)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the draft (default: drafts/NAME-METHOD beside the recipe).",
)
@click.option(
    "--method",
    type=click.Choice(["eagle3", "p_eagle", "dflash", "draft_model"]),
    default="eagle3",
    show_default=True,
    help="eagle3: a head on the target's hidden states; p_eagle: a head of several layers that proposes in one pass; "
    "dflash: a model over these states that denoises a block of tokens in one pass; draft_model: a model "
    "of some target layers.",
)
@click.option(
    "--layers",
    help="Target layers that a draft model, P-EAGLE head or DFlash draft starts from, like 0,1,29 (default: first two "
    "and last, or last two; the last one where a P-EAGLE head starts from an EAGLE-3 head).",
)
@click.option(
    "--start",
    type=existing,
    help="Folder of a draft to train further; an EAGLE-3 head may become a P-EAGLE head (default: none).",
)
@click.option(
    "--start-share",
    type=click.FloatRange(0, 1),
    help="Share of --start in the weights; use less with more new text (default: 0.5; 0 if its kind changes).",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=1_000_000, show_default=True, help="Answer tokens to train on."
)
@click.option("--steps", type=click.IntRange(1), default=4000, show_default=True, help="Training steps.")
@click.option(
    "--draft-vocab",
    type=click.IntRange(32),
    help="Size of the draft's vocabulary; with --start, its tokens are selected again (default: 7680, or the "
    "vocabulary of --start).",
)
@click.option(
    "--objective",
    type=click.Choice(["distribution", "token"]),
    default="distribution",
    show_default=True,
    help="Training objective: the target's distribution, or the token it chose.",
)
@click.option("--prompts", type=existing, help="JSON lines with the key prompt (default: the target writes prompts).")
@click.option(
    "--transcripts", type=existing, help="JSON lines with the keys prompt and answer, written by the target earlier."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Folder of text from an earlier run with this target, to train on as well (may be repeated).",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--seed", default=0, show_default=True, help="Seed of the text and of the training.")
@as_json
@collected(DistillOptions)
def distill(console: Console, options: DistillOptions) -> None:
    """Train a draft for the target of RECIPE. After an interruption, the same command continues."""
    from pipeline.distill.run import distill as train  # imports torch

    settings = options.settings(console)
    figures = train(settings)
    if options.json_:
        print_json(figures.model_dump(mode="json"))
        return
    rows = [(kind, f"{per_step:.2f}") for kind, per_step in figures.tokens_per_step.items()]
    print_table(Table(("prompts", "tokens per step (K=4)"), rows, right=("tokens per step (K=4)",)))
    use = f"a recipe uses it with draft.source and speculation.method: {settings.method}"
    print_line(Verdict(f"trained a draft in {settings.out}; {use}", good=True))
