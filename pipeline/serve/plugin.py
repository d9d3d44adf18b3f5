"""The entry point `vllm.platform_plugins`: vLLM asks it in every process, before it reads its arguments."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ARTIFACT = "TANDEM_ARTIFACT"
"""Environment variable: the artifact that this process and its children serve."""


def platform() -> str | None:
    """The platform's class, if an artifact is served; any other model is left to vLLM's own platforms.

    The artifact is named by `TANDEM_ARTIFACT`, or is an argument of the command (`vllm serve DIRECTORY`).
    """
    found = os.environ.get(ARTIFACT) or next((one for one in sys.argv[1:] if _is_artifact(one)), None)
    if found is None:
        return None
    os.environ[ARTIFACT] = str(Path(found).resolve())  # for the processes that vLLM starts
    return "pipeline.serve.platform.TandemPlatform"


def _is_artifact(argument: str) -> bool:
    """Whether a manifest of ours lies there. What is in it is checked later."""
    folder = Path(argument.rpartition("=")[2])
    return (folder / "manifest.json").is_file() and (folder / "recipe.lock").is_file()
