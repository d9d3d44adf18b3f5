"""The command line of serving. A part of `cli.py`."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import Console, print_json
from pipeline.cli.options import (
    Command,
    artifact_dir,
    as_json,
    identity_option,
    issuer_option,
    policy_of,
    policy_option,
)
from pipeline.errors import HostError
from pipeline.serve.plugin import ARTIFACT

if TYPE_CHECKING:
    from pipeline.artifact.signing import Policy

DRAIN_S = "20"
"""Seconds that answers under way have when the server must end: within what Kubernetes gives a pod, 30."""

INSTALL = "run `pip install '.[vllm]'` in Tandem's folder"


def add_to(main: click.Group) -> None:
    """Add the commands."""
    main.add_command(serve)


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
    """Serve ARTIFACT (a folder, a name under artifacts/, or REGISTRY/NAME@VERSION-or-ALIAS) with vLLM.

    An OpenAI-compatible server on port 8000; everything else is passed on to vLLM (--port, --host, --api-key ...).
    A release is pulled and verified first. Nothing is compiled. With --json, what would be run is printed instead.
    """
    if find_spec("vllm") is None:
        raise HostError("vLLM is not installed here", where="tandem serve", fix=INSTALL)
    if not any(one.name == "tandem" for one in entry_points(group="vllm.platform_plugins")):
        raise HostError("vLLM does not see Tandem's plugin: an older installation", where="tandem serve", fix=INSTALL)
    root = _root(console, artifact, policy_of(policy_file, identity, issuer)).resolve()
    if policy_file is not None:
        os.environ["TANDEM_POLICY"] = str(policy_file.resolve())
    from pipeline.artifact.manifest import read

    defaults = {"--served-model-name": read(root).manifest.name, "--shutdown-timeout": DRAIN_S}
    given = {one.partition("=")[0] for one in vllm_args}
    more = [word for option, value in defaults.items() if option not in given for word in (option, value)]
    # Not vLLM's own command: that of its CPU build does not start, since it asks for a package named `vllm`.
    module = ("-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server")
    command = [sys.executable, *module, "--model", str(root), *more, *vllm_args]
    console.close()
    if json_:
        print_json({"command": command, "environment": {ARTIFACT: str(root)}})
        return
    os.execve(sys.executable, command, os.environ | {ARTIFACT: str(root)})  # noqa: S606 - becomes the server


def _root(console: Console, artifact: str, policy: Policy | None) -> Path:
    """The artifact's folder, pulled if it is a release. Files are verified when the server starts."""
    if "://" not in artifact and "@" not in artifact:
        root = artifact_dir(artifact)
        if policy is not None:
            from pipeline.artifact.signing import check_artifact

            check_artifact(root, policy)
        return root
    from pipeline.registry.pull import pull

    return pull(artifact, policy=policy, progress=console.transfer("pull"))
