"""Commands that run an artifact: run, bench. They import torch when they are called, not for `--help`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected, recipe_option
from pipeline.cli.paths import RECIPES, artifact_dir
from pipeline.cli.results import print_json
from pipeline.cli.trust import policy_of, policy_option


@dataclass(frozen=True)
class RunOptions:
    """The options of `tandem run`."""

    artifact: str
    prompt: str
    raw: bool
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    speculate: bool
    policy_file: Path | None
    json_: bool


@click.command(cls=Command)
@click.argument("artifact")
@click.option("--prompt", required=True, help="Text to answer.")
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Maximum number of new tokens."
)
@click.option("--temperature", default=0.0, show_default=True, help="Sampling temperature; 0 decodes greedily.")
@click.option("--top-k", default=0, show_default=True, help="Sample from the K most likely tokens; 0 is all.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens up to this probability; 1 is all."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@click.option("--speculate/--no-speculate", default=True, show_default=True, help="Decode with the draft, or without.")
@policy_option
@as_json
@collected(RunOptions)
def run(console: Console, options: RunOptions) -> None:
    """Generate text with ARTIFACT. The text is streamed to stdout."""
    from pipeline.runtime.open import load  # these two import torch
    from pipeline.runtime.text import StreamDecoder

    engine = load(artifact_dir(options.artifact), policy_of(options.policy_file))
    plain = options.raw or not engine.text.has_chat
    tokens = engine.text.encode(options.prompt) if plain else engine.text.chat(options.prompt)
    stream = StreamDecoder(engine.text.decode)

    def show(_: int, new: list[int]) -> None:
        click.echo(stream.push(new), nl=False)

    answer = engine.generate(
        [tokens], max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, seed=options.seed, speculate=options.speculate,
        on_tokens=None if options.json_ else show,
    )[0]  # fmt: skip
    if options.json_:
        print_json(asdict(answer))
        return
    click.echo(stream.rest())
    per_step = sum(answer.emitted_per_step) / max(answer.steps, 1)
    console.log(f"[{len(answer.tokens)} tokens, {answer.steps} speculative steps, tokens per step: {per_step:.2f}]")


@click.command(cls=Command)
@click.argument("artifact")
@click.option("--against", type=click.Choice(["hf"]), help="Measure transformers with the same pair in the same run.")
@click.option("--prompts", "count", type=click.IntRange(1), default=8, show_default=True,
              help="Number of the recipe's prompts to measure.")  # fmt: skip
@click.option(
    "--max-new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Maximum number of new tokens."
)
@recipe_option
@policy_option
@as_json
def bench(
    artifact: str, against: str | None, count: int, max_new_tokens: int, recipe_file: Path | None,
    policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Measure ARTIFACT with and without speculation. The runs are interleaved."""
    from pipeline.measure.bench import bench as measure  # imports torch

    base = recipe_file.parent if recipe_file else RECIPES
    rows = measure(artifact_dir(artifact), base, count, max_new_tokens, against, policy_of(policy_file))
    if json_:
        print_json([asdict(row) for row in rows])
        return
    click.echo(f"{'':<24}{'first token':>12}{'per token: p50':>16}{'p99':>10}{'tokens/s':>10}{'tokens/step':>13}")
    for row in rows:
        cells = f"{row.first_token_ms:>9.0f} ms{row.p50_ms:>13.1f} ms{row.p99_ms:>7.1f} ms"
        click.echo(f"{row.name:<24}{cells}{row.tokens_per_s:>10.1f}{row.tokens_per_step:>13.2f}")
