"""Commands for AWS's own Neuron software: nxdi, vllm-args, vllm-cache pack, install, check; and neuron selftest."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pipeline.artifact.host import host_facts
from pipeline.cache.local import default_root
from pipeline.cli.console import Console
from pipeline.cli.groups import Command, Group
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import artifact_dir, complete_artifact, complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_line, print_result, print_table
from pipeline.cli.tables import Table, Verdict
from pipeline.cli.words import counted, size
from pipeline.errors import InputError
from pipeline.files.atomic import check_writable
from pipeline.files.home import expanded
from pipeline.nxdi import build as packages
from pipeline.nxdi import vllm_cache as caches
from pipeline.nxdi import vllm_cache_keys
from pipeline.nxdi.vllm_args import classic
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import make_plan
from pipeline.progress import duration, stage
from pipeline.recipe import load
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.recipe.chips import CHIPS


@click.command(cls=Command)
@click.argument("recipe", shell_complete=complete_recipe)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--compile", "compile_", is_flag=True, help="Compile with NxD Inference on this machine.")
@as_json
@click.pass_obj
def nxdi(console: Console, recipe: str, directory: Path, compile_: bool, json_: bool) -> None:
    """Configure or compile RECIPE with NxD Inference.

    DIRECTORY receives NxD Inference's configuration or, with --compile, an artifact that vLLM's NxDI-backed plugin
    loads.
    """
    path = recipe_path(recipe)
    parsed = load(path)
    if compile_:
        from pipeline.sources.pair import resolve_pair  # keeps torch out of the other commands

        with stage("sources: target and draft", console.log, console.progress):
            target, draft = resolve_pair(
                parsed, base=path.parent, cache=default_root() / "sources", progress=console.progress
            )
        console.log("compile: with NxD Inference; this takes a long time")
        with stage("compile: with NxD Inference", console.log, console.progress):
            written = packages.build(directory, make_plan(parsed, target.config, draft.config), (target, draft)).root
    else:
        pinned = read(lock_path(path))
        plan = make_plan(parsed, *pair_configs(parsed, pinned, str(lock_path(path))))
        written = packages.write(directory, plan, pinned)
    print_result({"written": written}, f"wrote {written}", as_json=json_)


@click.command("vllm-args", cls=Command)
@click.argument("artifact", shell_complete=complete_artifact)
@as_json
def vllm_args(artifact: str, json_: bool) -> None:
    """Print the vLLM command for an NxD Inference package. It is for AWS's classic vLLM plugin."""
    serve = classic(artifact_dir(artifact))
    if json_:
        print_json(asdict(serve))
        return
    k, counted = serve.draft_tokens, serve.num_speculative_tokens
    click.echo(f"# K = {k}: num_speculative_tokens is {counted}, since this plugin counts the tokens to verify")
    click.echo(serve.shell())


@click.group("vllm-cache", cls=Group)
def vllm_cache() -> None:
    """Ship compile caches of vLLM's Neuron plugin."""


@dataclass(frozen=True)
class PackOptions:
    """The options of `tandem vllm-cache pack`."""

    directory: Path
    name: str
    out: Path
    serve: str
    variables: tuple[str, ...]
    versions: tuple[str, ...]
    expect: Path | None
    json_: bool

    @property
    def run(self) -> caches.ServerRun:
        """The server that filled the cache."""
        return caches.ServerRun(
            _words("--serve", self.serve), _pairs("--env", self.variables), _pairs("--version-of", self.versions),
            vllm_cache_keys.read_keys(self.expect) if self.expect else (),
        )  # fmt: skip


@vllm_cache.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the release.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory of the artifact.")
@click.option("--serve", required=True, help="Arguments of the `vllm serve` that filled the cache, as one text.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE",
              help="Environment variable of that server (may be repeated).")  # fmt: skip
@click.option("--version-of", "versions", multiple=True, metavar="PACKAGE=VERSION",
              help="Version on the host that filled the cache, if it differs here; may be repeated.")  # fmt: skip
@click.option("--expect", type=click.Path(path_type=Path),
              help="File with the keys of the server's graphs, one a line (default: all of the cache).")  # fmt: skip
@as_json
@collected(PackOptions)
def pack(console: Console, options: PackOptions) -> None:
    """Pack DIRECTORY into an artifact. DIRECTORY is a filled VLLM_CACHE_ROOT, or its neuron/compile_cache."""
    del console
    manifest = caches.pack(options.directory, options.out, options.name, options.run)
    data = {
        "artifact": options.out,
        "name": manifest.name,
        "version": manifest.version,
        "backend": manifest.backend.model_dump(),
    }
    graphs = counted(manifest.backend.keys, "graph")
    line = f"packed {manifest.name} {manifest.version} in {options.out}: {graphs}, {size(manifest.size_bytes)}"
    print_result(data, line, as_json=options.json_)


@vllm_cache.command()
@click.argument("artifact", shell_complete=complete_artifact)
@click.option("--cache-root", type=click.Path(path_type=Path), envvar="VLLM_CACHE_ROOT",
              help="vLLM's cache root, on a local disk (default: VLLM_CACHE_ROOT, or ~/.cache/vllm).")  # fmt: skip
@as_json
@click.pass_obj
def install(console: Console, artifact: str, cache_root: Path | None, json_: bool) -> None:
    """Install ARTIFACT into vLLM's cache, and print the command that serves it without compiling."""
    root = cache_root or expanded("~/.cache/vllm", "--cache-root")
    versions = caches.installed_versions()
    installed = caches.install(artifact_dir(artifact), root, host=host_facts(), versions=versions)
    if json_:
        print_json(asdict(installed))
        return
    console.log(f"{installed.cache_root}: {installed.added} graphs added, {installed.kept} already present")
    _log_unchecked(console, installed.unchecked)
    click.echo(installed.shell())


@vllm_cache.command()
@click.argument("artifact", shell_complete=complete_artifact)
@click.option("--cache-root", type=click.Path(path_type=Path), envvar="VLLM_CACHE_ROOT",
              help="vLLM's cache root (default: VLLM_CACHE_ROOT, or ~/.cache/vllm).")  # fmt: skip
@as_json
@click.pass_obj
def check(console: Console, artifact: str, cache_root: Path | None, json_: bool) -> None:
    """Check, before vLLM starts, that its cache has every graph that ARTIFACT's manifest lists."""
    root = cache_root or expanded("~/.cache/vllm", "--cache-root")
    versions = caches.installed_versions()
    checked = vllm_cache_keys.check(artifact_dir(artifact), root, host=host_facts(), versions=versions)
    _log_unchecked(console, checked.unchecked)
    print_result(asdict(checked), f"{checked.cache_root}: {counted(checked.graphs, 'graph')}, complete", as_json=json_)


def _log_unchecked(console: Console, packages: Sequence[str]) -> None:
    if packages:
        console.log(f"not compared, because not installed on this host: {', '.join(packages)}")


def _words(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(str(error), where=option, fix="quote it as a shell would") from error


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if bad := [name for name, equals, _ in pairs if not (name and equals)]:
        raise InputError(f"found {bad[0]!r}, expected NAME=VALUE", where=option, fix=f"write {option} NAME=VALUE")
    return {name: value for name, _, value in pairs}


@click.group(cls=Group)
def neuron() -> None:
    """Try the Neuron backend on this host."""


@neuron.command()
@click.option("--target", type=click.Choice(list(CHIPS)), help="Chip (default: this host's).")
@click.option("--lnc", type=click.IntRange(1, 2), default=1, show_default=True,
              help="Physical cores per logical core, with --target.")  # fmt: skip
@click.option("--frontend", type=click.Choice(["xla", "stablehlo"]), default="xla", show_default=True,
              help="How graphs are traced.")  # fmt: skip
@click.option("--pair", "pairs", type=click.Choice(["pico", "smollm2"]), multiple=True,
              help="Pair to build (default: both); may be repeated.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("selftest.json"), show_default=True,
              help="File of the results.")  # fmt: skip
@as_json
@click.pass_obj
def selftest(
    console: Console, target: str | None, lnc: int, frontend: str, pairs: tuple[str, ...], out: Path, json_: bool
) -> None:  # fmt: skip
    """Build, validate and measure two small pairs on this host; write one file with the results.

    The file can be attached to an issue. It has versions, times, verdicts and error messages, no weights and no
    prompts. The exit code is 1 if a step failed.
    """
    from pipeline import selftest as trial  # imports the stages of a build

    chip = trial.chip_of_host() if target is None else {"target": target, "lnc": lnc}
    settings = NeuronSettings.model_validate({"name": "neuron", "frontend": frontend} | chip)
    check_writable(out.absolute().parent)
    work = default_root() / "selftest"
    work.mkdir(parents=True, exist_ok=True)
    done = trial.selftest(
        settings, out, work, pairs or tuple(trial.PAIRS), log=console.log, progress=console.progress
    )  # fmt: skip
    if json_:
        print_json(json.loads(out.read_bytes()))
    else:
        rows = [(of.pair, of.step, duration(of.seconds), _verdict(of.failure)) for of in done.steps]
        print_table(Table(("pair", "step", "time", "result"), rows))
        print_line(f"wrote {out}")
    sys.exit(1 if done.failed else 0)


def _verdict(failure: str) -> Verdict:
    return Verdict(failure, good=False) if failure else Verdict("passed", good=True)
