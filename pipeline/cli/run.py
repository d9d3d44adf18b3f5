"""Commands that run an artifact: run, bench. They import torch when they are called, not for `--help`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.artifact.manifest import read_pair
from pipeline.cli.console import Console
from pipeline.cli.facts import gate_warning, settings_lines, unchecked_warning
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected, recipe_option
from pipeline.cli.paths import RECIPES, artifact_dir, complete_artifact
from pipeline.cli.results import print_json, print_table
from pipeline.cli.tables import Table
from pipeline.cli.trust import policy_of, policy_option
from pipeline.cli.utf8 import Utf8Text
from pipeline.cli.words import counted, number
from pipeline.errors import InputError
from pipeline.runtime.open import load

if TYPE_CHECKING:
    from pipeline.runtime.calls import Generation
    from pipeline.runtime.rules import Rules


RULES = ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "json_schema", "logprobs")
"""Fields of `Rules` with an option of the same name."""
SETTINGS = ("temperature", "top_k", "top_p", "max_new_tokens", *RULES)
"""Parameters of `Engine.generate`, and fields of its rules, with an option of the same name."""


@dataclass(frozen=True)
class RunOptions:
    """The options of `tandem run`."""

    artifact: str
    prompt: str
    raw: bool
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int
    speculate: bool
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    json_schema: Path | None
    logprobs: int | None
    policy_file: Path | None
    json_: bool


@click.command(cls=Command)
@click.argument("artifact", shell_complete=complete_artifact)
@click.option("--prompt", type=Utf8Text(), required=True, help="Text to answer.")
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Maximum number of new tokens (default: of generation_config.json, else 128).",
)
@click.option(
    "--temperature",
    type=float,
    help="Sampling temperature; 0 decodes greedily (default: of generation_config.json if it samples, else 0).",
)
@click.option(
    "--top-k",
    type=int,
    help="Sample from the K most likely tokens; 0 is all (default: of generation_config.json, else 50).",
)
@click.option(
    "--top-p",
    type=float,
    help="Sample from the likeliest tokens up to this probability; 1 is all (default: of generation_config.json, "
    "else 1).",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@click.option("--speculate/--no-speculate", default=True, show_default=True, help="Decode with the draft, or without.")
@click.option("--min-p", type=float, help="Sample only tokens with this share of the likeliest token's probability.")
@click.option("--presence-penalty", type=float, help="Subtract this from the scores of tokens in the answer so far.")
@click.option("--frequency-penalty", type=float, help="The same for each time that a token is in the answer.")
@click.option("--repetition-penalty", type=float, help="Divide scores of tokens in the prompt and the answer so far.")
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Answer with JSON of the schema in this file.",
)
@click.option("--logprobs", type=int, help="Print each token's log probability, and those of the N most probable.")
@policy_option
@as_json
@collected(RunOptions)
def run(console: Console, options: RunOptions) -> None:
    """Generate text with ARTIFACT. The text is streamed to stdout.

    Settings that are not given are those of the model's generation_config.json, as in transformers. A warning is
    printed if the artifact failed its gates, does not apply one of these settings, or was pulled and its signature is
    not checked. An answer ends at an
    end-of-sequence token, at --max-new-tokens, or where the cache is full; the last line has the reason.
    """
    root, policy = artifact_dir(options.artifact), policy_of(options.policy_file)
    engine = load(root, policy)
    from pipeline.runtime.text import StreamDecoder  # its packages are there if the artifact was opened

    unchecked = unchecked_warning(engine.manifest, root, checked=policy is not None)
    for warning in filter(None, (unchecked, gate_warning(engine.manifest))):
        console.log(warning)
    choice = engine.choice(options.temperature, options.top_k, options.top_p)
    given = options.temperature is not None
    for line in settings_lines(engine.defaults, choice, engine.manifest.sampling, given=given):
        console.log(line)
    tokens = engine.text.encode(options.prompt) if options.raw else engine.text.encode_prompt(options.prompt)
    stream = StreamDecoder(engine.text.decode)

    def show(_: int, new: list[int]) -> None:
        click.echo(stream.push(new), nl=False)

    with _option_names():
        answer = engine.generate(
            [tokens], max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, seed=options.seed, speculate=options.speculate,
            rules=_rules(options, engine.rules()), on_tokens=None if options.json_ else show,
        )[0]  # fmt: skip
    if options.json_:
        print_json(asdict(answer), one_line=True)
        return
    click.echo(stream.rest())
    if answer.logprobs:
        print_table(_logprobs_table(answer, engine.text.token))
    limit = engine.new_tokens(len(tokens), options.max_new_tokens)
    console.log(f"[{_answer_words(answer, limit, len(tokens))}]")


def _rules(options: RunOptions, defaults: Rules) -> Rules:
    """Return the rules of the options; those that are not given are the model's."""
    given = {name: value for name in RULES if (value := getattr(options, name)) is not None}
    if options.json_schema is not None:
        given["json_schema"] = _text_of(options.json_schema)
    return replace(defaults, **given)


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{data[error.start]:02x} at index {error.start}"
        raise InputError(what, where=str(path), fix="save the file as UTF-8") from error


def _logprobs_table(answer: Generation, text: Callable[[int], str]) -> Table:
    """Return a row for each token: its log probability and rank, and the most probable tokens."""
    rows = [
        (repr(text(each.token)), f"{each.logprob:.3f}", str(each.rank),
         ", ".join(f"{text(token)!r} {logprob:.3f}" for token, logprob in each.top))
        for each in answer.logprobs
    ]  # fmt: skip
    return Table(("token", "log probability", "rank", "most probable"), rows, right=("log probability", "rank"))


@contextmanager
def _option_names() -> Iterator[None]:
    """Name the option in an error about a setting, which has the name of the Python parameter."""
    try:
        yield
    except InputError as error:
        if error.where not in SETTINGS:
            raise
        raise InputError(error.what, where=f"--{error.where.replace('_', '-')}", fix=error.fix) from error


def _answer_words(answer: Generation, limit: int, prompt: int) -> str:
    """Return the length of an answer, why it ended, and what speculation gained."""
    steps = f"{counted(answer.steps, 'speculative step')}, tokens per step: "
    gain = f"{steps}{sum(answer.emitted_per_step) / answer.steps:.2f}" if answer.steps else "no speculative step"
    if answer.finish_reason == "stop":
        end = "end-of-sequence token"
    elif len(answer.tokens) >= limit:
        end = "limit of --max-new-tokens"
    else:
        whole = counted(prompt + len(answer.tokens), "token")
        end = f"full cache ({whole} of prompt and answer); for longer answers, build a larger kv bucket"
    return f"{counted(len(answer.tokens), 'token')}; {gain}; ended by: {end}"


@dataclass(frozen=True)
class BenchOptions:
    """The options of `tandem bench`."""

    artifact: str
    against: str | None
    count: int
    max_new_tokens: int
    recipe_file: Path | None
    policy_file: Path | None
    json_: bool


@click.command(cls=Command)
@click.argument("artifact", shell_complete=complete_artifact)
@click.option("--against", type=click.Choice(["hf"]), help="Measure transformers with the same pair in the same run.")
@click.option("--prompts", "count", type=click.IntRange(1), default=8, show_default=True,
              help="Number of the recipe's prompts to measure.")  # fmt: skip
@click.option(
    "--max-new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Maximum number of new tokens."
)
@recipe_option
@policy_option
@as_json
@collected(BenchOptions)
def bench(console: Console, options: BenchOptions) -> None:
    """Measure ARTIFACT with and without speculation. The runs are interleaved."""
    from pipeline.measure.bench import bench as measure  # imports torch

    base = options.recipe_file.parent if options.recipe_file else RECIPES
    root = artifact_dir(options.artifact)
    if warning := gate_warning(read_pair(root).manifest):
        console.log(warning)
    policy = policy_of(options.policy_file)
    rows = measure(root, base, options.count, options.max_new_tokens, options.against, policy, console.log)
    if options.json_:
        print_json([asdict(row) for row in rows])
        return
    headings = ("", "first token", "per token (p50)", "per token (p99)", "tokens/s", "tokens/step")
    cells = [
        (row.name, f"{number(row.first_token_ms)} ms", f"{number(row.p50_ms)} ms", f"{number(row.p99_ms)} ms",
         number(row.tokens_per_s), f"{row.tokens_per_step:.2f}")
        for row in rows
    ]  # fmt: skip
    print_table(Table(headings, cells, right=headings[1:]))
