"""The command that starts a server: serve."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

import click

from pipeline.artifact.manifest import Manifest, PairManifest
from pipeline.artifact.signer import Signer
from pipeline.artifact.signing import Policy, has_signature, is_key, read_trusted
from pipeline.cli.console import Console
from pipeline.cli.facts import signature_words
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json
from pipeline.cli.paths import artifact_dir, complete_artifact
from pipeline.cli.results import print_json
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.errors import HostError, InputError, reason
from pipeline.extras import error_of_another_torch, install_command, require
from pipeline.registry.pull import pull_release
from pipeline.serve.plugin import ARTIFACT, ISSUER, POLICY, SIGNER
from pipeline.stores.base import extras_of

DRAIN_S = "20"
"""Seconds for running requests to finish at shutdown: less than the 30 of Kubernetes' default grace period."""


@click.command(cls=Command, context_settings={"ignore_unknown_options": True})
@click.argument("artifact", shell_complete=complete_artifact)
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

    The server has the OpenAI API on port 8000. Other options are passed to vLLM (--port, --host, --api-key ...);
    `tandem serve ARTIFACT -- --help=all` lists them.
    A release is pulled and verified first. Nothing is compiled. With --json, the server's command is printed and not
    run, which needs no vLLM.
    """
    _check_packages(artifact, signed=policy_file is not None or identity is not None, starts=not json_)
    address = _address(vllm_args)
    if not json_ and address is not None:
        _check_free(*address)
    policy = policy_of(policy_file, identity, issuer)
    root = _root(console, artifact, policy)
    trusted = read_trusted(root, policy)
    _check_limits(trusted.artifact.manifest, vllm_args)
    environment = {ARTIFACT: str(root)} | _signers(identity, issuer, policy_file)
    command = _server_command(root, trusted.artifact.manifest, vllm_args)
    console.close()
    if json_:
        print_json({"command": command, "environment": environment})
        return
    if not any(word.startswith("--help") for word in vllm_args):
        console.log(_starting(trusted.artifact.manifest, trusted.signer, root, address))
    os.execve(sys.executable, command, os.environ | environment)  # noqa: S606 - becomes the server


def _signers(identity: str | None, issuer: str | None, policy_file: Path | None) -> dict[str, str]:
    """Return the variables by which the server's own check requires the same signers; a key's file is absolute."""
    if policy_file is not None:
        return {POLICY: str(policy_file.resolve())}
    if identity is None:
        return {}
    named = str(Path(identity).resolve()) if is_key(identity) else identity
    return {SIGNER: named} | ({ISSUER: issuer} if issuer else {})


def _check_packages(artifact: str, *, signed: bool, starts: bool) -> None:
    registry = extras_of(artifact) if "://" in artifact else ()
    require([*(("vllm",) if starts else ()), *registry, *(("sign",) if signed else ())], "tandem serve")
    if starts and not any(entry.name == "tandem" for entry in entry_points(group="vllm.platform_plugins")):
        what = "vLLM does not find Tandem's plugin: the installation is too old"
        raise HostError(what, where="tandem serve", fix=install_command("vllm"))
    if starts and (error := error_of_another_torch("tandem serve")):
        raise error


def _given(vllm_args: Sequence[str], **defaults: str) -> dict[str, str]:
    """Return the values of some options of vLLM, by their names with underscores."""
    options = dict(defaults)
    for word, following in pairwise([*vllm_args, ""]):
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and key in options:
            options[key] = value if equals else following
    return options


def _check_limits(manifest: Manifest, vllm_args: Sequence[str]) -> None:
    """Check the limits of the server: vLLM's own check of a length ends in a traceback, after most of a minute.

    Raises:
        InputError: a limit above the artifact's.

    """
    if not isinstance(manifest, PairManifest):
        return
    most = {"max_model_len": max(manifest.shapes.kv), "max_num_seqs": max(manifest.shapes.batch)}
    for name, given in _given(vllm_args, **dict.fromkeys(most, "")).items():
        if given.isdecimal() and int(given) > most[name]:
            what = f"found {given}; the artifact's graphs hold at most {most[name]}"
            fix = f"use at most {most[name]}, or build with larger buckets"
            raise InputError(what, where=f"--{name.replace('_', '-')}", fix=fix)


def _address(vllm_args: Sequence[str]) -> tuple[str, int] | None:
    """Return host and port of the server; None for a Unix socket, or a port that vLLM will reject."""
    options = _given(vllm_args, host="0.0.0.0", port="8000", uds="")  # noqa: S104 - vLLM's default
    is_uds, port = options["uds"], options["port"]
    return None if is_uds or not port.isdecimal() else (options["host"], int(port))


def _check_free(host: str, port: int) -> None:
    """Check that the server can listen at an address: vLLM ends in a traceback after it has loaded the model.

    Raises:
        HostError: the port is in use or reserved, or the host is not of this machine.

    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        code = error.errno if isinstance(error, OSError) else 0
        if code in (socket.EAI_NONAME, errno.EADDRNOTAVAIL):
            what = f"{host} is not an address of this machine"
            raise HostError(what, where="--host", fix="use 127.0.0.1, or 0.0.0.0 for all addresses") from error
        what = f"{port} is in use" if code == errno.EADDRINUSE else f"cannot listen at {port}: {reason(error)}"
        raise HostError(what, where="--port", fix="choose a free port: --port N") from error


def _starting(manifest: Manifest, signer: Signer | None, root: Path, address: tuple[str, int] | None) -> str:
    """Return what will be served, and where, in one line."""
    place = "" if address is None else f", at http://{address[0]}:{address[1]}"
    signature = signature_words(signer, present=has_signature(root))
    return f"starting vLLM for {manifest.name} {manifest.version}, {signature}{place}; its log follows"


def _server_command(root: Path, manifest: Manifest, vllm_args: Sequence[str]) -> list[str]:
    """Return the command of vLLM's server, with Tandem's defaults for options that `vllm_args` lacks."""
    defaults = {"--served-model-name": manifest.name, "--shutdown-timeout": DRAIN_S}
    options = {word.partition("=")[0] for word in vllm_args}
    missing = [word for option, value in defaults.items() if option not in options for word in (option, value)]
    # Not `vllm serve`: that of vLLM's CPU build does not start, since it looks for a package named `vllm`.
    module = ("-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server")
    return [sys.executable, *module, "--model", str(root), *missing, *vllm_args]


def _root(console: Console, artifact: str, policy: Policy | None) -> Path:
    """Return the artifact's folder, pulled if it is a release. The server verifies the files."""
    if "://" in artifact or "@" in artifact:
        return pull_release(artifact, policy=policy, progress=console.transfer("pull")).path.resolve()
    return artifact_dir(artifact).resolve()
