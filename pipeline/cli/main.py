"""The command line: parse, call one function, render. The only file that prints or exits. Imports no torch itself."""

from __future__ import annotations

import errno
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline import __version__
from pipeline.cli.console import Console, Stream, print_error, print_json
from pipeline.cli.options import (
    QUIET,
    RECIPES,
    VERBOSE,
    ChipType,
    Group,
    artifact_dir,
    as_json,
    note,
    policy_of,
    policy_option,
    recipe_path,
)
from pipeline.errors import HostError, InputError, TandemError

recipe_option = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The recipe it was built from, which relative sources and prompts belong to (default: one in recipes/).",
)


class Tandem(Group):
    """Turns the failure tree into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error says where, what, fix; a traceback only with -v."""
        console = ctx.ensure_object(Console)
        try:
            return super().invoke(ctx)
        except TandemError as error:
            _end(console, error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader went away: click ends quietly
                raise
            _end(console, _of_host(error))
        except KeyboardInterrupt:
            console.close()
            click.echo("interrupted; run the same command to continue", err=True)
            sys.exit(130)
        finally:
            console.close()


def _end(console: Console, error: TandemError) -> NoReturn:
    console.close()
    print_error(error, with_traceback=console.verbose)
    sys.exit(error.exit_code)


def _of_host(error: OSError) -> HostError:
    """What the machine refused, wherever in a command that was."""
    places = (error.filename, error.filename2)
    where = " -> ".join(str(one) for one in places if one is not None)
    made = HostError(error.strerror or str(error), where=where, fix="-v shows what was being done")
    made.__cause__ = error
    return made


@click.group(cls=Tandem, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help=VERBOSE, expose_value=False, callback=note)
@click.option("-q", "--quiet", is_flag=True, help=QUIET, expose_value=False, callback=note)
def main() -> None:
    """Compile a target LLM and its draft in tandem: one recipe in, one validated artifact out."""


@main.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the artifact (default: artifacts/NAME).")
@click.option("--workers", type=click.IntRange(1), help="Compile workers (default: by cores and memory).")
@click.option("--locked", is_flag=True, help="Refuse sources or toolchains that differ from the recipe's lock.")
@click.option("--remote-cache", envvar="TANDEM_REMOTE_CACHE", help="Shared cache of graphs: a folder or s3://...")
@click.option("--push-cache", is_flag=True, envvar="TANDEM_PUSH_CACHE", help="Write compiled graphs there, too.")
@click.option("--no-validate", is_flag=True, help="Skip the gates; the artifact cannot be published.")
@as_json
@click.pass_obj
def build(
    console: Console,
    recipe: str,
    out: Path | None,
    workers: int | None,
    locked: bool,
    remote_cache: str | None,
    push_cache: bool,
    no_validate: bool,
    json_: bool,
) -> None:
    """Build RECIPE (a name in recipes/, or a file) into a validated artifact."""
    from pipeline.build import BuildSettings, run
    from pipeline.cache.remote import Remote
    from pipeline.plan.lock import lock_path
    from pipeline.recipe import load

    path = recipe_path(recipe)
    parsed = load(path)
    remote = Remote(remote_cache, "write" if push_cache else "read") if remote_cache else None
    settings = BuildSettings(
        recipe=parsed, base=path.parent, out=out or Path("artifacts") / parsed.name, workers=workers,
        validate=not no_validate, locked=locked, remote=remote,
        lock=lock_path(path), log=console.log, progress=console.progress,
    )  # fmt: skip
    report = run(settings)
    if json_:
        print_json(asdict(report))
    elif report.fresh:
        click.echo(f"{report.artifact}: nothing changed ({report.seconds:.2f} s)")
    else:
        done = f"{len(report.compiled)} graphs compiled, {len(report.reused)} from the cache"
        click.echo(f"{report.artifact}: {done} ({report.seconds:.0f} s)")


@main.command()
@click.argument("recipe")
@as_json
def plan(recipe: str, json_: bool) -> None:
    """Show graphs, memory per rank and times of RECIPE, without weights where its lock has the configs."""
    from pipeline.plan.lock import lock_path, pair_configs, read
    from pipeline.plan.plan import make_plan
    from pipeline.recipe import load

    path = recipe_path(recipe)
    parsed = load(path)
    if lock_path(path).is_file():
        configs = pair_configs(parsed, read(lock_path(path)), str(lock_path(path)))
    else:
        from pipeline.cache.local import default_root
        from pipeline.sources.pair import resolve_pair

        pair = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
        configs = pair[0].config, pair[1].config
    made = make_plan(parsed, *configs)
    memory = asdict(made.memory) | {"total": made.memory.total}
    if json_:
        print_json({"graphs": [spec.name for spec in made.graphs], "memory_bytes_per_rank": memory})
        return
    click.echo(f"{parsed.name}: {len(made.graphs)} graphs, {made.pair.models.tp} rank(s)")
    for spec in made.graphs:
        click.echo(f"  {spec.name}")
    for name, size in memory.items():
        click.echo(f"  {name.replace('_', ' '):<16}{size / (1 << 20):>12,.1f} MiB per rank")


@main.command()
@click.argument("artifact")
@click.option("--prompt", required=True, help="Text to answer.")
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-k", default=0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--speculate/--no-speculate", default=True)
@policy_option
@as_json
@click.pass_obj
def run(
    console: Console, artifact: str, prompt: str, raw: bool, max_new_tokens: int, temperature: float, top_k: int,
    top_p: float, seed: int, speculate: bool, policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Stream the answer of ARTIFACT to a prompt."""
    from pipeline.runtime.open import load

    engine = load(artifact_dir(artifact), policy_of(policy_file))
    tokens = engine.text.encode(prompt) if raw or not engine.text.has_chat else engine.text.chat(prompt)
    stream = Stream(engine.text.decode)
    answer = engine.generate(
        [tokens], max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        speculate=speculate, on_tokens=None if json_ else lambda _, new: click.echo(stream.push(new), nl=False),
    )[0]  # fmt: skip
    if json_:
        print_json(asdict(answer))
        return
    click.echo(stream.rest())
    per_step = sum(answer.emitted_per_step) / max(answer.steps, 1)
    console.log(f"[{len(answer.tokens)} tokens, {answer.steps} speculative steps, {per_step:.2f} tokens a step]")


@main.command()
@click.argument("artifact")
@click.option("--against", type=click.Choice(["hf"]), help="Measure transformers with the same pair in the same run.")
@click.option(
    "--prompts", "count", type=click.IntRange(1), default=8, show_default=True, help="How many of the recipe's prompts."
)
@click.option("--max-new-tokens", type=click.IntRange(2), default=64, show_default=True)
@recipe_option
@policy_option
@as_json
def bench(
    artifact: str, against: str | None, count: int, max_new_tokens: int, recipe_file: Path | None,
    policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Measure ARTIFACT with and without speculation, interleaved, in one run."""
    from pipeline.measure.bench import bench as measure

    base = recipe_file.parent if recipe_file else RECIPES
    rows = measure(artifact_dir(artifact), base, count, max_new_tokens, against, policy_of(policy_file))
    if json_:
        print_json([asdict(row) for row in rows])
        return
    click.echo(f"{'':<24}{'first token':>12}{'a token: p50':>14}{'p99':>10}{'tokens/s':>10}{'tokens/step':>13}")
    for row in rows:
        cells = f"{row.first_token_ms:>9.0f} ms{row.p50_ms:>11.1f} ms{row.p99_ms:>7.1f} ms"
        click.echo(f"{row.name:<24}{cells}{row.tokens_per_s:>10.1f}{row.tokens_per_step:>13.2f}")


@main.command()
@click.argument("artifact")
@click.option("--markdown", is_flag=True, help="Print tables for a summary or a comment.")
@as_json
def inspect(artifact: str, markdown: bool, json_: bool) -> None:
    """Show what ARTIFACT is, without opening its weights or graphs."""
    from pipeline.artifact.manifest import PairManifest, read
    from pipeline.registry.card import body, facts

    found = read(artifact_dir(artifact))
    manifest = found.manifest
    if markdown:
        click.echo(body(manifest, {"": manifest}))
        return
    if json_:
        print_json(manifest.model_dump(mode="json"))
        return
    if not isinstance(manifest, PairManifest):
        for name, value in facts(manifest).items():
            click.echo(f"{name:<16}{value}")
        return
    size = sum(entry.size for entry in manifest.files.values())
    passed = manifest.passed
    verdict = {True: "passed", False: "FAILED", None: "not validated"}[passed]
    for name, value in {
        "artifact": f"{manifest.name} {manifest.version}", "path": found.root, "created": manifest.created,
        "needs": manifest.requires, "toolchain": manifest.toolchain, "ranks": manifest.ranks,
        "dtype": manifest.dtype + (f", weights {manifest.weights}" if manifest.weights else ""),
        "K": list(manifest.draft_tokens), "sampling": list(manifest.sampling),
        "candidates": manifest.pair.candidates or "all",
        "graphs": len(manifest.graphs), "files": f"{len(manifest.files)}, {size / (1 << 20):.1f} MiB", "gates": verdict,
    }.items():  # fmt: skip
        click.echo(f"{name:<12}{value}")


@main.command()
@click.argument("artifact")
@recipe_option
@click.option("--on-device", is_flag=True, help="Refuse to judge an artifact for an accelerator anywhere else.")
@policy_option
@as_json
@click.pass_obj
def validate(
    console: Console, artifact: str, recipe_file: Path | None, on_device: bool, policy_file: Path | None, json_: bool
) -> None:  # fmt: skip
    """Run the gates on ARTIFACT again and store the reports in it; they say what they ran on."""
    from pipeline.artifact.manifest import read, read_pair
    from pipeline.validate.run import validate_artifact

    root = artifact_dir(artifact)
    device = read(root).manifest.requires.get("device", "cpu")
    if on_device and device == "cpu":
        raise InputError("the artifact runs on a CPU", where=str(root), fix="leave out --on-device")
    if (policy := policy_of(policy_file)) is not None:
        from pipeline.artifact.signing import check_artifact

        check_artifact(root, policy)
    validate_artifact(root, recipe_file.parent if recipe_file else RECIPES, console.log)
    if json_:
        print_json(read_pair(root).manifest.validation)


@main.command()
@click.argument("artifacts", nargs=-1)
@click.option("--schema", "schema_", is_flag=True, help="Print the JSON Schema of reports/parity.json.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the page here (default: compare.html, for two).")
@as_json
def report(artifacts: tuple[str, ...], schema_: bool, out: Path | None, json_: bool) -> None:
    """Show the parity report of ARTIFACTS: of one, or what moved from a first to a second and if it is beyond noise."""
    from pipeline.files.atomic import write_atomic
    from pipeline.validate.report import compare, summaries
    from pipeline.validate.report import schema as report

    if schema_:
        print_json(report.schema())
        return
    if len(artifacts) not in (1, 2):
        raise InputError(f"{len(artifacts)} artifacts", where="report", fix="give one, or two to compare")
    roots = [artifact_dir(name) for name in artifacts]
    found = [report.load(root) for root in roots]
    if len(found) == 1:
        if json_:
            print_json(summaries.summary(found[0]))
        else:
            click.echo(summaries.markdown(found[0]), nl=False)
        return
    changes = compare.compare(*found)
    page = out or Path("compare.html")
    write_atomic(page, compare.render(*found).encode())
    if json_:
        print_json([asdict(change) for change in changes])
        return
    for change in changes:
        click.echo(
            f"{change.what:<44}{summaries.show(change.before):>12}{summaries.show(change.after):>12}"
            f"  {compare.judgement(change)}"
        )
    click.echo(f"the page is {page}")


@main.command()
@click.argument("recipe", required=False)
@click.option("--backend", type=click.Choice(["inductor", "neuron"]), default="inductor", show_default=True)
@click.option("--target", type=ChipType(), default="trn2", help="Chip, for neuron.")
@click.option("--lnc", type=click.IntRange(1, 2), default=1, help="Physical cores in a logical one, for neuron.")
@as_json
def doctor(recipe: str | None, backend: str, target: str, lnc: int, json_: bool) -> None:
    """Say what this machine can build and run; with RECIPE, whether it is enough for that."""
    from pipeline.doctor import diagnose
    from pipeline.recipe import load
    from pipeline.recipe.schema import InductorSettings, NeuronSettings

    if recipe is None:
        neuron = {"name": "neuron", "target": target, "lnc": lnc}
        found = diagnose(NeuronSettings.model_validate(neuron) if backend == "neuron" else InductorSettings())
    else:
        path = recipe_path(recipe)
        parsed = load(path)
        found = diagnose(parsed.backend, parsed, path)
    if json_:
        print_json(asdict(found))
    else:
        for section, facts in found.facts.items():
            for name, value in facts.items():
                click.echo(f"{section:<10}{name:<24}{value}")
        for problem in found.problems:
            click.echo(f"problem   {problem.where}: {problem.what}\n  fix: {problem.fix}")
    sys.exit(3 if found.problems else 0)


@main.command()
@click.argument("recipe")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--compile", "compile_", is_flag=True, help="Compile with NxD Inference, here, into an artifact.")
@as_json
@click.pass_obj
def nxdi(console: Console, recipe: str, directory: Path, compile_: bool, json_: bool) -> None:
    """Write what NxD Inference is asked for RECIPE, or, with --compile, what vLLM's NxDI-backed plugin loads."""
    from pipeline.cache.local import default_root
    from pipeline.nxdi import build as stage
    from pipeline.plan.lock import lock_path, pair_configs, read
    from pipeline.plan.plan import make_plan
    from pipeline.recipe import load
    from pipeline.sources.pair import resolve_pair

    path = recipe_path(recipe)
    parsed = load(path)
    if compile_:
        console.log("sources: target and draft")
        pair = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
        console.log("compile: with NxD Inference; this takes long")
        written = stage.build(directory, make_plan(parsed, *(one.config for one in pair)), pair).root
    else:
        pinned = read(lock_path(path))
        made = make_plan(parsed, *pair_configs(parsed, pinned, str(lock_path(path))))
        written = stage.write(directory, made, pinned)
    if json_:
        print_json({"written": written})
        return
    click.echo(f"wrote {written}")


from pipeline.cli import drafts as cli_drafts  # noqa: E402 - they add their commands to `main`
from pipeline.cli import recipes as cli_recipe  # noqa: E402
from pipeline.cli import registry as cli_registry  # noqa: E402
from pipeline.cli import serve as cli_serve  # noqa: E402
from pipeline.cli import vllm as cli_vllm  # noqa: E402

cli_recipe.add_to(main)
cli_registry.add_to(main)
cli_drafts.add_to(main)
cli_serve.add_to(main)
cli_vllm.add_to(main)
