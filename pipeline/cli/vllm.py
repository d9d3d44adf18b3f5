"""The command line for vLLM's Neuron plugins: vllm-args, vllm-cache. A part of `cli.py`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.cli.console import Console, print_json
from pipeline.cli.options import Command, Group, artifact_dir, as_json
from pipeline.errors import InputError


def add_to(main: click.Group) -> None:
    """Add the commands."""
    for command in (vllm_args, vllm_cache):
        main.add_command(command)


@click.command("vllm-args", cls=Command)
@click.argument("artifact")
@as_json
def vllm_args(artifact: str, json_: bool) -> None:
    """Print how AWS's classic vLLM plugin serves ARTIFACT, which NxD Inference compiled: a line for a shell."""
    from pipeline.nxdi.vllm_args import classic

    found = classic(artifact_dir(artifact))
    if json_:
        print_json(asdict(found))
        return
    k, told = found.draft_tokens, found.num_speculative_tokens
    click.echo(f"# K = {k}: this plugin counts the tokens that the target verifies, so it is told {told}")
    click.echo(found.shell())


@click.group("vllm-cache", cls=Group)
def vllm_cache() -> None:
    """Ship compile caches of vLLM's newer Neuron plugin."""


@vllm_cache.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the release.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory of the artifact.")
@click.option("--serve", required=True, help="Arguments of the `vllm serve` that filled it, as one text.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable that server was given.")
@click.option("--version-of", "versions", multiple=True, metavar="PACKAGE=VERSION",
              help="A version that it was filled with, where it is not the one installed here.")  # fmt: skip
@as_json
def pack(
    directory: Path, name: str, out: Path, serve: str, variables: tuple[str, ...], versions: tuple[str, ...],
    json_: bool,
) -> None:  # fmt: skip
    """Make an artifact of DIRECTORY: a VLLM_CACHE_ROOT, or its neuron/compile_cache, that a server has filled."""
    from pipeline.nxdi.vllm_cache import ServerRun
    from pipeline.nxdi.vllm_cache import pack as make

    try:
        words = shlex.split(serve)
    except ValueError as error:
        raise InputError(str(error), where="--serve", fix="quote it as a shell would") from error
    run = ServerRun(words, _pairs("--env", variables), _pairs("--version-of", versions))
    made = make(directory, out, name, run)
    if json_:
        print_json({"artifact": out, "name": made.name, "version": made.version, "backend": made.backend.model_dump()})
        return
    size = made.size_bytes / (1 << 20)
    click.echo(f"{out}: {made.name} {made.version}, {made.backend.keys} graphs, {size:.1f} MiB")


@vllm_cache.command()
@click.argument("artifact")
@click.option("--cache-root", type=click.Path(path_type=Path), envvar="VLLM_CACHE_ROOT",
              help="vLLM's cache root, on a local disk (default: VLLM_CACHE_ROOT, or ~/.cache/vllm).")  # fmt: skip
@as_json
@click.pass_obj
def install(console: Console, artifact: str, cache_root: Path | None, json_: bool) -> None:
    """Put ARTIFACT where vLLM reads it, and print the line that serves it without compiling."""
    from pipeline.artifact.host import host_facts
    from pipeline.nxdi.vllm_cache import install as put
    from pipeline.nxdi.vllm_cache import installed_versions

    place = cache_root or Path.home() / ".cache/vllm"
    found = put(artifact_dir(artifact), place, host=host_facts(), versions=installed_versions())
    if json_:
        print_json(asdict(found))
        return
    console.log(f"{found.cache_root}: {found.added} graphs added, {found.kept} were there")
    if found.unchecked:
        console.log(f"not installed here, so their versions were not compared: {', '.join(found.unchecked)}")
    click.echo(found.shell())


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    if bad := [name for name, equals, _ in pairs if not (name and equals)]:
        raise InputError(f"{bad[0]!r} has no =", where=option, fix=f"write {option} NAME=VALUE")
    return {name: value for name, _, value in pairs}
