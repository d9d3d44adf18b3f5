"""vLLM's settings for an artifact, and our own options. Imports no vLLM."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline.artifact.manifest import PairManifest
from pipeline.artifact.signing import policy_of
from pipeline.errors import ArtifactError, InputError, no_string
from pipeline.records import Record
from pipeline.runtime.answers import check_remembered
from pipeline.runtime.open import verified
from pipeline.serve.plugin import ISSUER, POLICY, SIGNER

VERIFIED = "TANDEM_VERIFIED_MANIFEST"
"""Environment variable: the sha256 of the manifest that was verified, for the server's other processes."""

BLOCK = 16
"""Tokens of a block, for the scheduler's counts."""

SALT = "tandem_cache_salt"
"""Extra argument of a request in which the platform hands its `cache_salt` to the worker."""

CONFIG = "config.json"

UNSUPPORTED_DEFAULTS = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0,
}  # fmt: skip
"""Settings that vLLM takes from `generation_config.json` and only shaped graphs support, with their neutral values."""


class ServeOptions(Record):
    """Our part of `--additional-config`, under `tandem`."""

    speculate_up_to: int | None = Field(default=None, ge=0)
    """Largest number of rows that speculate together; with more rows, all take decode steps."""
    prefill_tokens: int | None = Field(default=None, ge=1)
    """Tokens of prompts that a step reads beside running requests; by default what takes as long as their step."""
    remember_tokens: int = Field(default=0, ge=0)
    """Tokens of answers that are kept, to propose from them in later requests of the same `cache_salt`; 0: none."""


def options(additional_config: object) -> ServeOptions:
    """Return our options in vLLM's additional configuration.

    Raises:
        InputError: an unknown option, or a value of another type.

    """
    section = additional_config.get("tandem", {}) if isinstance(additional_config, Mapping) else {}
    try:
        return ServeOptions.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("additional-config", "tandem", *map(str, first["loc"])))
        known = ", ".join(ServeOptions.model_fields)
        raise InputError(f"{first['msg']} (found {first['input']!r})", where=where, fix=f"options: {known}") from error


def check_options(additional_config: object, manifest: PairManifest) -> None:
    """Check our options against an artifact.

    Raises:
        InputError: as `options`, and for answers to keep where the artifact has no prompt lookup.

    """
    tokens = options(additional_config).remember_tokens
    check_remembered(manifest, tokens, "additional-config.tandem.remember_tokens")


def with_salt(extra_args: Mapping[str, Any] | None, inputs: object) -> dict[str, Any] | None:
    """Return a request's extra arguments with its `cache_salt`; a salt among them that a client wrote is dropped."""
    found = {name: value for name, value in (extra_args or {}).items() if name != SALT}
    salt = inputs.get("cache_salt") if isinstance(inputs, Mapping) else None
    return (found | {SALT: salt}) if salt else (found or None)


@dataclass(frozen=True)
class ReplacedDefaults:
    """Defaults of requests in place of unsupported ones, and these as `name=value`."""

    values: Mapping[str, float]
    left_out: tuple[str, ...]


def request_defaults(
    checkpoint: Mapping[str, Any], asked: Mapping[str, Any], sampling: Collection[str]
) -> ReplacedDefaults:  # fmt: skip
    """Return the defaults to replace: of the checkpoint's, those that the artifact's graphs do not support.

    `checkpoint` are the settings that vLLM reads for the model, `asked` those of `--override-generation-config`;
    `sampling` are the artifact's kinds of graphs. Without stochastic ones, requests are greedy unless they set a
    temperature; with shaped ones, every setting is supported.

    Raises:
        InputError: an unsupported setting in `asked`.

    """
    no_string(sampling, "sampling", "kinds of sampling")
    unsampled = {} if "stochastic" in sampling else {"temperature": 0.0}
    neutral: dict[str, float] = ({} if "shaped" in sampling else UNSUPPORTED_DEFAULTS) | unsampled
    for name, value in neutral.items():
        if asked.get(name) not in (None, value):
            what = f"{name}={asked[name]} is not supported by the artifact's graphs"
            raise InputError(what, where="--override-generation-config", fix=f"remove {name}")
    unsupported = {name: checkpoint[name] for name in neutral if checkpoint.get(name) not in (None, neutral[name])}
    values = {name: neutral[name] for name in unsupported} | unsampled
    left_out = tuple(f"{name}={value}" for name, value in unsupported.items() if name not in asked)
    return ReplacedDefaults(values, left_out)


def most_tokens(manifest: PairManifest) -> int:
    """Return the longest prompt and answer together: the last token is not read, so it needs no cache position."""
    return manifest.shapes.kv[-1]


def blocks(manifest: PairManifest) -> int:
    """Return the number of blocks that all slots can fill, drafts at the end included, and vLLM's own block."""
    per_slot = -(-(most_tokens(manifest) + 2 * max(manifest.draft_tokens) + 1) // BLOCK)
    return manifest.shapes.batch[-1] * per_slot + 1


def of_vllm(root: Path, manifest: PairManifest) -> dict[str, Any]:
    """Return values of vLLM's arguments, by their names in the engine's arguments."""
    return {
        "tokenizer": str(root / "tokenizer"),
        "dtype": manifest.dtype,
        "max_model_len": most_tokens(manifest),
        "max_num_seqs": manifest.shapes.batch[-1],
        "tensor_parallel_size": 1,
        "enforce_eager": True,
    }


@cache
def checked(root: Path) -> PairManifest:
    """Return the manifest of an artifact after verifying every file, its gates, and that it runs on this host.

    `TANDEM_POLICY` or `TANDEM_REQUIRE_SIGNATURE` set the required signers. Verifies once per process: vLLM calls it
    repeatedly.

    Raises:
        ArtifactError: as `runtime.verified`, gates that failed or did not run, or no configuration for vLLM.
        InputError: both variables are set.

    """
    policy, signer = os.environ.get(POLICY), os.environ.get(SIGNER)
    issuer = os.environ.get(ISSUER) or None
    artifact = verified(root, policy_of(Path(policy) if policy else None, signer or None, issuer))
    manifest = artifact.manifest
    os.environ[VERIFIED] = hashlib.sha256(artifact.data).hexdigest()
    if manifest.passed is not True:
        what = "validation gates failed" if manifest.passed is False else "validation gates did not run"
        raise ArtifactError(what, where=str(root), fix=f"run `tandem validate {root}`")
    if CONFIG not in manifest.files:
        what = f"no {CONFIG} for vLLM: an older version of Tandem built this artifact"
        raise ArtifactError(what, where=str(root), fix="build the artifact again; its graphs come from the cache")
    return manifest


def sent(name: str, value: object) -> str:
    """Return a field's value as a client may have sent it: vLLM's chat API turns `logprobs: true` into a number."""
    if name != "logprobs":
        return str(value)
    return f"true with {value} `top_logprobs`, or {value} in completions"
