"""Commands for AWS's own Neuron software: nxdi, vllm-args, and vllm-cache pack, install."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.artifact.host import host_facts
from pipeline.cache.local import default_root
from pipeline.cli.console import Console
from pipeline.cli.groups import Command, Group
from pipeline.cli.options import as_json
from pipeline.cli.paths import artifact_dir, complete_artifact, complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_result
from pipeline.cli.words import counted, size
from pipeline.errors import InputError
from pipeline.files.home import expanded
from pipeline.nxdi import build as packages
from pipeline.nxdi import vllm_cache as caches
from pipeline.nxdi.vllm_args import classic
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import make_plan
from pipeline.progress import stage
from pipeline.recipe import load


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


@vllm_cache.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the release.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory of the artifact.")
@click.option("--serve", required=True, help="Arguments of the `vllm serve` that filled the cache, as one text.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE",
              help="Environment variable of that server (may be repeated).")  # fmt: skip
@click.option("--version-of", "versions", multiple=True, metavar="PACKAGE=VERSION",
              help="Version on the host that filled the cache, if it differs here; may be repeated.")  # fmt: skip
@as_json
def pack(
    directory: Path, name: str, out: Path, serve: str, variables: tuple[str, ...], versions: tuple[str, ...],
    json_: bool,
) -> None:  # fmt: skip
    """Pack DIRECTORY into an artifact. DIRECTORY is a filled VLLM_CACHE_ROOT, or its neuron/compile_cache."""
    run = caches.ServerRun(_words("--serve", serve), _pairs("--env", variables), _pairs("--version-of", versions))
    manifest = caches.pack(directory, out, name, run)
    data = {
        "artifact": out,
        "name": manifest.name,
        "version": manifest.version,
        "backend": manifest.backend.model_dump(),
    }
    graphs = counted(manifest.backend.keys, "graph")
    line = f"packed {manifest.name} {manifest.version} in {out}: {graphs}, {size(manifest.size_bytes)}"
    print_result(data, line, as_json=json_)


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
    if installed.unchecked:
        console.log(f"not compared, because not installed on this host: {', '.join(installed.unchecked)}")
    click.echo(installed.shell())


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
