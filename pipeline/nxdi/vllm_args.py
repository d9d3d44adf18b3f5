"""The command that starts vLLM's classic, NxDI-backed Neuron plugin on an artifact that NxD Inference compiled.

Verifies the artifact and reads its settings; starts nothing. Imports no torch.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from pipeline.artifact.manifest import CacheManifest, Manifest, NxdiManifest
from pipeline.artifact.verify import verify
from pipeline.errors import ArtifactError, InputError, no_string
from pipeline.files.limits import AGAIN, parse_json
from pipeline.records import Record

SETTINGS = "tandem-nxdi.json"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class ServeCommand:
    """A command, the folder in which it is started, and its environment variables."""

    directory: str
    environment: Mapping[str, str]
    command: tuple[str, ...]
    draft_tokens: int
    num_speculative_tokens: int

    def shell(self) -> str:
        """Return the command as one line for a shell."""
        return f"cd {shlex.quote(self.directory)} && {shell_line(self.environment, self.command)}"


def shell_line(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """Return a command with its environment as one line; names of variables are not quoted."""
    no_string(command, "command", "arguments")
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, shlex.join(command)])


class _Speculation(Record):
    model: str
    num_speculative_tokens: int = Field(ge=1)


class _Arguments(Record):
    model_config = ConfigDict(extra="allow")

    model: str
    speculation: _Speculation = Field(alias="speculative-config")


class _Vllm(Record):
    environment: dict[str, str]
    arguments: _Arguments


def classic(root: Path) -> ServeCommand:
    """Return the command for an artifact of NxD Inference in any folder.

    Its `neuron_config.json` has paths of the models relative to the artifact, so the command is started inside.

    Raises:
        ArtifactError: the artifact does not verify, or has no valid settings of vLLM.
        InputError: an artifact of another kind; the fix is the command that serves it.

    """
    manifest = verify(root).manifest
    if not isinstance(manifest, NxdiManifest):
        raise _other_kind(manifest, root)
    if SETTINGS not in manifest.files:
        raise ArtifactError(f"no {SETTINGS} in the artifact", where=str(root), fix=AGAIN)
    return read_settings(root / SETTINGS, manifest.draft_tokens)


def read_settings(path: Path, draft_tokens: int) -> ServeCommand:
    """Return the command from the settings in an artifact's folder.

    Raises:
        ArtifactError: no valid settings of vLLM.

    """
    try:
        settings = _Vllm.model_validate(parse_json(path.read_bytes())["vllm"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactError("no valid settings of vLLM", where=str(path), fix=AGAIN) from error
    return _command(path.parent.resolve(), settings, draft_tokens, path)


def _command(root: Path, settings: _Vllm, draft_tokens: int, path: Path) -> ServeCommand:
    options = settings.arguments.model_extra or {}
    if bad := [name for name in settings.environment if not VARIABLE.fullmatch(name)]:
        what = f"invalid name of an environment variable: {bad[0]!r}"
        raise ArtifactError(what, where=str(path), fix="do not use this artifact")
    if bad := [name for name in options if not OPTION.fullmatch(name)]:
        raise ArtifactError(f"invalid name of an option: {bad[0]!r}", where=str(path), fix="do not use this artifact")
    speculation = settings.arguments.speculation
    draft = {"model": str(root / speculation.model), "num_speculative_tokens": speculation.num_speculative_tokens}
    command = ["vllm", "serve", str(root / settings.arguments.model)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--speculative-config", json.dumps(draft)]
    environment = dict(settings.environment)
    if "NEURON_COMPILED_ARTIFACTS" in environment:
        environment["NEURON_COMPILED_ARTIFACTS"] = str(root / environment["NEURON_COMPILED_ARTIFACTS"])
    return ServeCommand(str(root), environment, tuple(command), draft_tokens, speculation.num_speculative_tokens)


def _other_kind(manifest: Manifest, root: Path) -> InputError:
    if isinstance(manifest, CacheManifest):
        what, fix = "a compile cache of vLLM's newer Neuron plugin", f"tandem vllm-cache install {root}"
    else:
        what = f"an artifact of the {manifest.toolchain['backend']} backend; vLLM's own Neuron plugins do not load it"
        fix = f"tandem serve {shlex.quote(str(root))}"
    return InputError(what, where=str(root), fix=fix)
