"""The entry point `vllm.platform_plugins`: vLLM calls it in every process, before it reads its arguments."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ARTIFACT = "TANDEM_ARTIFACT"
"""Environment variable: the artifact that this process and its children serve."""
POLICY, SIGNER, ISSUER = "TANDEM_POLICY", "TANDEM_REQUIRE_SIGNATURE", "TANDEM_ISSUER"
"""Environment variables: the policy file; or the key file, or identity and its issuer, that must have signed."""


def platform() -> str | None:
    """Return the name of the platform's class if this process serves an artifact; None for any other model.

    `TANDEM_ARTIFACT` or an argument of the command (`vllm serve DIRECTORY`) names the artifact.
    """
    artifact = os.environ.get(ARTIFACT) or next((word for word in sys.argv[1:] if _is_artifact(word)), None)
    if artifact is None:
        return None
    os.environ[ARTIFACT] = str(Path(artifact).resolve())  # for the processes that vLLM starts
    return "pipeline.serve.platform.TandemPlatform"


def _is_artifact(argument: str) -> bool:
    """Return whether an argument is a folder with a manifest of Tandem; the manifest is verified later."""
    folder = argument.rpartition("=")[2]
    # os.path, not pathlib, whose `is_file` raises for a word that no file can have as its name: JSON, a long prompt.
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("manifest.json", "recipe.lock"))  # noqa: PTH113, PTH118
