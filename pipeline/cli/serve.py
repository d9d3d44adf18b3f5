"""The command that starts a server: serve."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import click

from pipeline.artifact.manifest import read
from pipeline.artifact.signing import Policy, check_artifact
from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json
from pipeline.cli.paths import artifact_dir
from pipeline.cli.results import print_json
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.errors import HostError
from pipeline.extras import install_command, require
from pipeline.registry.pull import pull
from pipeline.serve.plugin import ARTIFACT
from pipeline.stores.base import extras_of

DRAIN_S = "20"
"""Seconds for running requests to finish at shutdown: less than the 30 of Kubernetes' default grace period."""


@click.command(cls=Command, context_settings={"ignore_unknown_options": True})
@click.argument("artifact")
@click.argument("vllm_args", nargs=-1, type=click.UNPROCESSED)
@identity_option
@issuer_option
@policy_option
@as_json
@click.pass_obj
def serve(
    console: Console, artifact: str, vllm_args: tuple[str, ...],
    identity: str | None, issuer: str | None, policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Serve ARTIFACT with vLLM. ARTIFACT is a folder, a name under artifacts/, or REGISTRY/NAME@VERSION-or-ALIAS.

    The server has the OpenAI API on port 8000. Other options are passed to vLLM (--port, --host, --api-key ...).
    A release is pulled and verified first. Nothing is compiled. With --json, the server's command is printed and not
    run.
    """
    _check_packages(artifact, signed=policy_file is not None or identity is not None)
    root = _root(console, artifact, policy_of(policy_file, identity, issuer)).resolve()
    environment = {ARTIFACT: str(root)}
    if policy_file is not None:
        environment["TANDEM_POLICY"] = str(policy_file.resolve())
    command = _server_command(root, vllm_args)
    console.close()
    if json_:
        print_json({"command": command, "environment": environment})
        return
    os.execve(sys.executable, command, os.environ | environment)  # noqa: S606 - becomes the server


def _check_packages(artifact: str, *, signed: bool) -> None:
    registry = extras_of(artifact) if "://" in artifact else ()
    require(["vllm", *registry, *(("sign",) if signed else ())], "tandem serve")
    if not any(entry.name == "tandem" for entry in entry_points(group="vllm.platform_plugins")):
        what = "vLLM does not find Tandem's plugin: the installation is too old"
        raise HostError(what, where="tandem serve", fix=install_command("vllm"))


def _server_command(root: Path, vllm_args: Sequence[str]) -> list[str]:
    """Return the command of vLLM's server, with Tandem's defaults for options that `vllm_args` lacks."""
    defaults = {"--served-model-name": read(root).manifest.name, "--shutdown-timeout": DRAIN_S}
    options = {word.partition("=")[0] for word in vllm_args}
    missing = [word for option, value in defaults.items() if option not in options for word in (option, value)]
    # Not `vllm serve`: that of vLLM's CPU build does not start, since it looks for a package named `vllm`.
    module = ("-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server")
    return [sys.executable, *module, "--model", str(root), *missing, *vllm_args]


def _root(console: Console, artifact: str, policy: Policy | None) -> Path:
    """Return the artifact's folder, pulled if it is a release. Files are verified when the server starts."""
    if "://" in artifact or "@" in artifact:
        return pull(artifact, policy=policy, progress=console.transfer("pull"))
    root = artifact_dir(artifact)
    if policy is not None:
        check_artifact(root, policy)
    return root
