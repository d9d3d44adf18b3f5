"""The command that writes a first recipe for a target: init."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.cache.local import default_root
from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import RECIPES
from pipeline.cli.results import print_json, print_line
from pipeline.errors import InputError
from pipeline.files.atomic import create_only
from pipeline.proposal.propose import Wish, propose_recipe
from pipeline.recipe.chips import CHIPS, ChipName

DEFAULT_CHIP: ChipName = "trn2"


@dataclass(frozen=True)
class InitOptions:
    """The options of `tandem init`."""

    source: str
    draft: str | None
    backend: str
    target: ChipName | None
    traffic: Path | None
    out: Path | None
    json_: bool


@click.command(cls=Command)
@click.argument("source")
@click.option("--draft", help="Source of the draft (default: a known one of this target, else layers of the target).")
@click.option(
    "--backend", type=click.Choice(["inductor", "neuron"]), default="inductor", show_default=True,
    help="Backend that compiles the graphs.",
)  # fmt: skip
@click.option("--target", type=click.Choice(sorted(CHIPS)), help="With --backend neuron: chip (default: trn2).")
@click.option(
    "--traffic", type=click.Path(dir_okay=False, path_type=Path),
    help="Log or histogram of prompt and answer lengths, for the buckets.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path),
    help="Recipe file to write (default: NAME.yaml, in recipes/ if that folder exists).",
)  # fmt: skip
@as_json
@collected(InitOptions)
def init(console: Console, options: InitOptions) -> None:
    """Write a first recipe for the target SOURCE.

    The file has the reason of each value. SOURCE is written as `target.source` is in a recipe; relative folders start
    here. Configs and tokenizers are read; weights are not downloaded, except a GGUF file in a Python package, which is
    one file. An existing file is never overwritten.
    """
    if options.target is not None and options.backend != "neuron":
        raise InputError("option without --backend neuron", where="--target", fix="add --backend neuron")
    chip = None if options.backend == "inductor" else options.target or DEFAULT_CHIP
    folder = options.out.parent if options.out else RECIPES if RECIPES.is_dir() else Path()
    if options.out is not None:
        _check_new(options.out)
    wish = Wish(options.source, folder, options.draft, chip, options.traffic)
    proposal = propose_recipe(wish, default_root() / "sources", console.log, console.progress)
    path = options.out or folder / f"{proposal.name}.yaml"
    _check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not create_only(path, proposal.text.encode()):
        raise _exists(path)
    if options.json_:
        print_json({"recipe": str(path), "values": proposal.chosen.values, "reasons": proposal.chosen.reasons})
        return
    print_line(f"wrote {path}")
    named = shlex.quote(str(path))
    print_line(f"next: tandem recipe check {named}; tandem plan {named}; tandem build {named}")


def _check_new(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise _exists(path)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"found the suffix {path.suffix!r}; accepted: .yaml", where="--out", fix=f"use {path}.yaml")


def _exists(path: Path) -> InputError:
    return InputError("the file exists and is never overwritten", where=str(path), fix="use --out with another name")
