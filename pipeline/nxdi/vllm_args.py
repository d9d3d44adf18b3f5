"""How vLLM's classic, NxDI-backed Neuron plugin is started on an artifact that NxD Inference compiled.

Reads what the artifact says, after its digests were checked; starts nothing. Imports no torch.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from pipeline.artifact.manifest import AGAIN, CacheManifest, Manifest, NxdiManifest
from pipeline.artifact.verify import verify
from pipeline.errors import ArtifactError, InputError
from pipeline.records import Record

ASKED = "tandem-nxdi.json"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Serve:
    """A command, the folder that it is started in, and what it must find in its environment."""

    directory: str
    environment: Mapping[str, str]
    command: tuple[str, ...]
    draft_tokens: int
    num_speculative_tokens: int

    def shell(self) -> str:
        """One line for a shell."""
        return f"cd {shlex.quote(self.directory)} && {shell_line(self.environment, self.command)}"


def shell_line(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """A command with its environment; the names must be names of variables."""
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


def classic(root: Path) -> Serve:
    """The command for an artifact of NxD Inference, wherever it lies.

    Its `neuron_config.json` names the models relative to the artifact, so the command is started inside.

    Raises:
        ArtifactError: it does not verify, or does not say how it is served.
        InputError: it is of another kind; says what serves it.

    """
    found = verify(root)
    manifest = found.manifest
    if not isinstance(manifest, NxdiManifest):
        raise _other_kind(manifest, root)
    if ASKED not in found.manifest.files:
        raise ArtifactError(f"{ASKED} is not in it", where=str(root), fix=AGAIN)
    place = root / ASKED
    try:
        told = _Vllm.model_validate(json.loads(place.read_bytes())["vllm"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactError("does not say how vLLM is started", where=str(place), fix=AGAIN) from error
    return _serve(root.resolve(), told, manifest.draft_tokens, place)


def _serve(root: Path, told: _Vllm, draft_tokens: int, place: Path) -> Serve:
    options = told.arguments.model_extra or {}
    if bad := [name for name in told.environment if not VARIABLE.fullmatch(name)]:
        raise ArtifactError(f"{bad[0]!r} is no environment variable", where=str(place), fix="do not use this artifact")
    if bad := [name for name in options if not OPTION.fullmatch(name)]:
        raise ArtifactError(f"{bad[0]!r} is no option of vLLM", where=str(place), fix="do not use this artifact")
    speculation = told.arguments.speculation
    draft = {"model": str(root / speculation.model), "num_speculative_tokens": speculation.num_speculative_tokens}
    command = ["vllm", "serve", str(root / told.arguments.model)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--speculative-config", json.dumps(draft)]
    environment = dict(told.environment)
    if "NEURON_COMPILED_ARTIFACTS" in environment:
        environment["NEURON_COMPILED_ARTIFACTS"] = str(root / environment["NEURON_COMPILED_ARTIFACTS"])
    return Serve(str(root), environment, tuple(command), draft_tokens, speculation.num_speculative_tokens)


def _other_kind(manifest: Manifest, root: Path) -> InputError:
    if isinstance(manifest, CacheManifest):
        what, fix = "a compile cache of the newer plugin, which is installed", f"tandem vllm-cache install {root}"
    else:
        what = f"made by the {manifest.toolchain['backend']} backend; vLLM's own Neuron plugins do not load it"
        fix = f"vllm serve {root.resolve()}, with Tandem installed beside vLLM"
    return InputError(what, where=str(root), fix=fix)
