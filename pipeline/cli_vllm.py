"""The command line for vLLM's Neuron plugins: vllm-args, vllm-cache. A part of `cli.py`."""

from __future__ import annotations

from dataclasses import asdict

import click

from pipeline.commands import Command, artifact_dir, as_json
from pipeline.console import print_json


def add_to(main: click.Group) -> None:
    """Add the commands."""
    for command in (vllm_args,):
        main.add_command(command)


@click.command("vllm-args", cls=Command)
@click.argument("artifact")
@as_json
def vllm_args(artifact: str, json_: bool) -> None:
    """Print how AWS's classic vLLM plugin serves ARTIFACT, which NxD Inference compiled: a line for a shell."""
    from pipeline.vllm_args import classic

    found = classic(artifact_dir(artifact))
    if json_:
        print_json(asdict(found))
        return
    k, told = found.draft_tokens, found.num_speculative_tokens
    click.echo(f"# K = {k}: this plugin counts the tokens that the target verifies, so it is told {told}")
    click.echo(found.shell())
