"""The command line: parse, call one function, render. The only file that prints or exits. Imports no torch itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline import __version__
from pipeline.console import Console, print_error, print_json
from pipeline.errors import InputError, TandemError

RECIPES = Path("recipes")
VERBOSE = "Show tracebacks."
QUIET = "Show results and errors only."


class Command(click.Command):
    """A command that takes -v and -q, as the group before it does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for letter, name, text in (("-v", "verbose", VERBOSE), ("-q", "quiet", QUIET)):
            self.params.append(
                click.Option([letter, f"--{name}"], is_flag=True, help=text, expose_value=False, callback=_note)
            )


def _note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and param.name:
        setattr(ctx.ensure_object(Console), param.name, True)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type


class Tandem(Group):
    """Turns the failure tree into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error says where, what, fix; a traceback only with -v."""
        console = ctx.ensure_object(Console)
        try:
            return super().invoke(ctx)
        except TandemError as error:
            console.close()
            print_error(error, with_traceback=console.verbose)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            console.close()
            click.echo("interrupted; run the same command to continue", err=True)
            sys.exit(130)
        finally:
            console.close()


@click.group(cls=Tandem, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help=VERBOSE, expose_value=False, callback=_note)
@click.option("-q", "--quiet", is_flag=True, help=QUIET, expose_value=False, callback=_note)
def main() -> None:
    """Compile a target LLM and its draft in tandem: one recipe in, one validated artifact out."""


def _recipe(name: str) -> Path:
    from pipeline.recipe import find

    return find(name, RECIPES)


def _artifact_dir(name: str) -> Path:
    """An artifact by path, or by the name of its recipe under `artifacts/`."""
    for path in (Path(name), Path("artifacts") / name):
        if (path / "manifest.json").is_file():
            return path
    built = sorted(path.parent.name for path in Path("artifacts").glob("*/manifest.json"))
    here = f"artifacts here: {', '.join(built) or 'none'}"
    fix = f"make build RECIPE={name}" if (RECIPES / f"{name}.yaml").is_file() else f"name an artifact's folder; {here}"
    raise InputError(f"no artifact {name!r}", where="artifacts", fix=fix)


as_json = click.option("--json", "json_", is_flag=True, help="Print JSON for machines.")


@main.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the artifact (default: artifacts/NAME).")
@click.option("--workers", type=click.IntRange(1), help="Compile workers (default: by cores and memory).")
@click.option("--locked", is_flag=True, help="Refuse sources or toolchains that differ from the recipe's lock.")
@click.option("--no-validate", is_flag=True, help="Skip the gates; the artifact cannot be published.")
@as_json
@click.pass_obj
def build(
    console: Console,
    recipe: str,
    out: Path | None,
    workers: int | None,
    locked: bool,
    no_validate: bool,
    json_: bool,
) -> None:
    """Build RECIPE (a name in recipes/, or a file) into a validated artifact."""
    from pipeline.build import Request, run
    from pipeline.lock import lock_path
    from pipeline.recipe import load

    path = _recipe(recipe)
    parsed = load(path)
    request = Request(
        recipe=parsed, base=path.parent, out=out or Path("artifacts") / parsed.name, workers=workers,
        validate=not no_validate, locked=locked,
        lock=lock_path(path), say=console.say, progress=console.progress,
    )  # fmt: skip
    report = run(request)
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
    from pipeline.lock import lock_path, pair_configs, read
    from pipeline.plan import make_plan
    from pipeline.recipe import load

    path = _recipe(recipe)
    parsed = load(path)
    if lock_path(path).is_file():
        configs = pair_configs(parsed, read(lock_path(path)), str(lock_path(path)))
    else:
        from pipeline.cache import default_root
        from pipeline.sources import resolve_pair

        pair = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
        configs = pair[0].config, pair[1].config
    made = make_plan(parsed, *configs)
    memory = asdict(made.memory) | {"total": made.memory.total}
    if json_:
        print_json({"graphs": [spec.name for spec in made.graphs], "memory_bytes_per_rank": memory})
        return
    click.echo(f"{parsed.name}: {len(made.graphs)} graphs, {made.pair.tp} rank(s)")
    for spec in made.graphs:
        click.echo(f"  {spec.name}")
    for name, size in memory.items():
        click.echo(f"  {name.replace('_', ' '):<16}{size / (1 << 20):>12,.1f} MiB per rank")


@main.command()
@click.argument("artifact")
@click.option("--prompt", required=True, help="Text to answer.")
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-k", default=0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--speculate/--no-speculate", default=True)
@as_json
@click.pass_obj
def run(
    console: Console, artifact: str, prompt: str, raw: bool, max_new_tokens: int, temperature: float, top_k: int,
    top_p: float, seed: int, speculate: bool, json_: bool,
) -> None:  # fmt: skip
    """Stream the answer of ARTIFACT to a prompt."""
    from pipeline.runtime import load

    engine = load(_artifact_dir(artifact))
    tokens = engine.text.encode(prompt) if raw or not engine.text.has_chat else engine.text.chat(prompt)
    answer = engine.generate(
        [tokens], max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        speculate=speculate, on_tokens=None if json_ else _streamer(engine.text.decode),
    )[0]  # fmt: skip
    if json_:
        print_json(asdict(answer))
        return
    click.echo("")
    per_step = sum(answer.emitted_per_step) / max(answer.steps, 1)
    console.say(f"[{len(answer.tokens)} tokens, {answer.steps} speculative steps, {per_step:.2f} tokens a step]")


def _streamer(decode: Callable[[list[int]], str]) -> Callable[[int, list[int]], None]:
    """Print text as tokens come; holds back an unfinished multi-byte character."""
    seen: list[int] = []
    shown = ""

    def show(index: int, tokens: list[int]) -> None:
        nonlocal shown
        seen.extend(tokens)
        text = decode(seen)
        if index == 0 and not text.endswith("\ufffd"):
            click.echo(text[len(shown) :], nl=False)
            shown = text

    return show


@main.command()
@click.argument("artifact")
@click.option("--against", type=click.Choice(["hf"]), help="Measure transformers with the same pair in the same run.")
@click.option("--prompts", "count", default=8, show_default=True, help="How many of the recipe's prompts.")
@click.option("--max-new-tokens", default=64, show_default=True)
@as_json
def bench(artifact: str, against: str | None, count: int, max_new_tokens: int, json_: bool) -> None:
    """Measure ARTIFACT with and without speculation, interleaved, in one run."""
    from pipeline.runtime.bench import bench as measure

    rows = measure(_artifact_dir(artifact), count, max_new_tokens, against)
    if json_:
        print_json([asdict(row) for row in rows])
        return
    click.echo(f"{'':<24}{'first token':>12}{'p50':>10}{'p99':>10}{'tokens/s':>10}{'tokens/step':>13}")
    for row in rows:
        cells = f"{row.first_token_ms:>9.0f} ms{row.p50_ms:>7.1f} ms{row.p99_ms:>7.1f} ms"
        click.echo(f"{row.name:<24}{cells}{row.tokens_per_s:>10.1f}{row.tokens_per_step:>13.2f}")


@main.command()
@click.argument("artifact")
@as_json
def inspect(artifact: str, json_: bool) -> None:
    """Show what ARTIFACT is, without opening its weights or graphs."""
    from pipeline.artifact import read

    found = read(_artifact_dir(artifact))
    manifest = found.manifest
    if json_:
        print_json(manifest.model_dump(mode="json"))
        return
    size = sum(entry.size for entry in manifest.files.values())
    passed = (manifest.validation or {}).get("passed")
    verdict = {True: "passed", False: "FAILED", None: "not validated"}[passed]
    for name, value in {
        "artifact": f"{manifest.name} {manifest.version}", "path": found.root, "created": manifest.created,
        "needs": manifest.requires, "toolchain": manifest.toolchain, "ranks": manifest.tensor, "dtype": manifest.dtype,
        "K": list(manifest.draft_tokens), "sampling": list(manifest.sampling),
        "candidates": manifest.candidates or "all",
        "graphs": len(manifest.graphs), "files": f"{len(manifest.files)}, {size / (1 << 20):.1f} MiB", "gates": verdict,
    }.items():  # fmt: skip
        click.echo(f"{name:<12}{value}")


@main.command()
@click.argument("artifact")
@as_json
@click.pass_obj
def verify(console: Console, artifact: str, json_: bool) -> None:
    """Check every file of ARTIFACT against its manifest."""
    from pipeline.artifact import verify as check

    found = check(_artifact_dir(artifact), lambda done, total: console.progress("verify", done, total))
    if json_:
        print_json({"name": found.manifest.name, "version": found.manifest.version, "files": len(found.manifest.files)})
        return
    click.echo(f"{found.manifest.name} {found.manifest.version}: {len(found.manifest.files)} files match")


@main.command()
@click.argument("first")
@click.argument("second")
@as_json
def diff(first: str, second: str, json_: bool) -> None:  # noqa: ARG001 - it is JSON either way
    """Show what differs between two artifacts."""
    from pipeline.artifact import diff as compare
    from pipeline.artifact import read

    print_json(compare(read(_artifact_dir(first)).manifest, read(_artifact_dir(second)).manifest))


@main.command()
@click.argument("artifact")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The recipe it was built from, which relative sources and prompts belong to (default: one in recipes/).",
)
@click.option("--on-device", is_flag=True, help="Refuse to judge an artifact for an accelerator anywhere else.")
@as_json
@click.pass_obj
def validate(console: Console, artifact: str, recipe_file: Path | None, on_device: bool, json_: bool) -> None:
    """Run the gates on ARTIFACT again and store the reports in it; they say what they ran on."""
    from pipeline.artifact import read
    from pipeline.validate import validate_artifact

    root = _artifact_dir(artifact)
    device = read(root).manifest.requires.get("device", "cpu")
    if on_device and device == "cpu":
        raise InputError("the artifact runs on a CPU", where=str(root), fix="leave out --on-device")
    validate_artifact(root, recipe_file.parent if recipe_file else RECIPES, console.say)
    if json_:
        print_json(read(root).manifest.validation)


@main.command()
@click.argument("artifacts", nargs=-1)
@click.option("--schema", "schema_", is_flag=True, help="Print the JSON Schema of reports/parity.json.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the page here (default: compare.html, for two).")
@as_json
def report(artifacts: tuple[str, ...], schema_: bool, out: Path | None, json_: bool) -> None:
    """Show the parity report of ARTIFACTS: of one, or what moved from a first to a second and if it is beyond noise."""
    from pipeline.files import write_atomic
    from pipeline.validate import compare, report

    if schema_:
        print_json(report.schema())
        return
    if len(artifacts) not in (1, 2):
        raise InputError(f"{len(artifacts)} artifacts", where="report", fix="give one, or two to compare")
    roots = [_artifact_dir(name) for name in artifacts]
    found = [report.load(root) for root in roots]
    if len(found) == 1:
        if json_:
            print_json(report.summary(found[0]))
        else:
            click.echo(report.markdown(found[0]), nl=False)
        return
    changes = compare.compare(*found)
    page = out or Path("compare.html")
    write_atomic(page, compare.render(*found).encode())
    if json_:
        print_json([asdict(change) for change in changes])
        return
    for change in changes:
        click.echo(
            f"{change.what:<44}{report.show(change.before):>12}{report.show(change.after):>12}"
            f"  {compare.judgement(change)}"
        )
    click.echo(f"the page is {page}")


@main.command()
@click.argument("artifact")
@click.option("--to", "url", default="artifacts/registry", show_default=True, help="Registry: a folder.")
@click.option("--alias", "aliases", multiple=True, help="Point this alias at the release.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent.")
@as_json
def publish(artifact: str, url: str, aliases: tuple[str, ...], dry_run: bool, json_: bool) -> None:
    """Publish ARTIFACT as an immutable release."""
    from pipeline.publish import publish as send

    release = send(_artifact_dir(artifact), url, aliases, dry_run=dry_run)
    if json_:
        print_json(asdict(release))
        return
    verb = "would send" if dry_run else "sent"
    click.echo(
        f"{release.name}@{release.version}: {verb} {release.sent} blobs, {release.sent_bytes / (1 << 20):.1f} MiB"
    )


@main.command()
@click.argument("reference")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@as_json
def pull(reference: str, directory: Path | None, json_: bool) -> None:
    """Pull a release, REGISTRY/NAME@VERSION-or-ALIAS, into DIRECTORY, verified."""
    from pipeline.pull import pull as fetch

    root = fetch(reference, directory)
    if json_:
        print_json({"artifact": root})
        return
    click.echo(str(root))


@main.command()
@click.argument("release")
@click.argument("alias_name")
@click.option("--to", "url", default="artifacts/registry", show_default=True)
@as_json
def alias(release: str, alias_name: str, url: str, json_: bool) -> None:
    """Point ALIAS_NAME at RELEASE, NAME@VERSION."""
    from pipeline.publish import set_alias

    set_alias(url, release, alias_name)
    if json_:
        print_json({"alias": alias_name, "release": release})
        return
    click.echo(f"{alias_name} -> {release}")


@main.command()
@click.argument("recipe", required=False)
@click.option("--backend", type=click.Choice(["inductor", "neuron"]), default="inductor", show_default=True)
@click.option("--target", type=click.Choice(["trn1", "trn2", "inf2"]), default="trn2", help="Chip, for neuron.")
@click.option("--lnc", type=click.IntRange(1, 2), default=1, help="Physical cores in a logical one, for neuron.")
@as_json
def doctor(recipe: str | None, backend: str, target: str, lnc: int, json_: bool) -> None:
    """Say what this machine can build and run; with RECIPE, whether it is enough for that."""
    from pipeline.doctor import diagnose
    from pipeline.recipe import load

    if recipe is None:
        found = diagnose({"name": backend, **({"target": target, "lnc": lnc} if backend == "neuron" else {})})
    else:
        path = _recipe(recipe)
        parsed = load(path)
        found = diagnose(parsed.backend.model_dump(), parsed, path)
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
def nxdi(recipe: str, directory: Path) -> None:
    """Write the NxD Inference configuration of RECIPE, and the script that compiles it, into DIRECTORY."""
    from pipeline.backends.neuron.nxdi import write
    from pipeline.lock import lock_path, pair_configs, read
    from pipeline.plan import make_plan
    from pipeline.recipe import load

    path = _recipe(recipe)
    parsed, lock_file = load(path), read(lock_path(path))
    made = make_plan(parsed, *pair_configs(parsed, lock_file, str(lock_path(path))))
    click.echo(f"wrote {write(directory, made, lock_file)}")


@main.group(cls=Group)
def cache() -> None:
    """Look after the cache of compiled graphs."""


@cache.command()
@as_json
def stats(json_: bool) -> None:
    """Count entries and bytes."""
    from pipeline.cache import Cache, default_root

    found = Cache(default_root()).stats()
    if json_:
        print_json(asdict(found) | {"root": default_root()})
        return
    click.echo(f"{found.entries} entries, {found.size_bytes / (1 << 20):.1f} MiB in {default_root()}")


@cache.command()
@click.option("--max-gib", type=float, required=True, help="Keep at most this much, the newest.")
@as_json
def gc(max_gib: float, json_: bool) -> None:
    """Remove the oldest entries."""
    from pipeline.cache import Cache, default_root

    removed = Cache(default_root()).gc(int(max_gib * (1 << 30)))
    if json_:
        print_json(asdict(removed))
        return
    click.echo(f"removed {removed.entries} entries, {removed.size_bytes / (1 << 20):.1f} MiB")


@main.group(cls=Group)
def recipe() -> None:
    """Check and lock recipes."""


@recipe.command()
@as_json
def schema(json_: bool) -> None:  # noqa: ARG001 - it is JSON either way
    """Print the JSON Schema of a recipe, for editors."""
    from pipeline.recipe import schema as make

    print_json(make())


@recipe.command()
@click.argument("names", nargs=-1, required=True)
@as_json
def check(names: tuple[str, ...], json_: bool) -> None:
    """Check recipes, and plan those that have a lock."""
    from pipeline.lock import lock_path, pair_configs, read
    from pipeline.plan import make_plan
    from pipeline.recipe import load

    for name in names:
        path = _recipe(name)
        parsed = load(path)
        if lock_path(path).is_file():
            make_plan(parsed, *pair_configs(parsed, read(lock_path(path)), str(lock_path(path))))
        if not json_:
            click.echo(f"{path}: ok")
    if json_:
        print_json({"checked": list(names)})


@recipe.command()
@click.argument("name")
@as_json
def lock(name: str, json_: bool) -> None:
    """Pin what RECIPE's sources and toolchain are now, beside it."""
    from pipeline.backends.base import make_backend
    from pipeline.cache import default_root
    from pipeline.lock import lock_path, make_lock, write
    from pipeline.recipe import load
    from pipeline.sources import resolve_pair

    path = _recipe(name)
    parsed = load(path)
    pair = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
    toolchain = make_backend(parsed.backend.model_dump()).toolchain().as_dict()
    write(lock_path(path), make_lock(parsed, *pair, toolchain))
    if json_:
        print_json({"lock": lock_path(path)})
        return
    click.echo(f"wrote {lock_path(path)}")
