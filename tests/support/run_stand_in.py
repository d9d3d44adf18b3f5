"""`tandem run` without an artifact: `python run_stand_in.py FOLDER ...` answers a prompt with text outside ASCII.

The tokens of the prompt go to the file `$TANDEM_TEST_TOKENS`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.cli import run
from pipeline.cli.main import main
from pipeline.runtime.text import Text

ANSWER = "na\u00efve \u4f60\u597d \U0001f600"


@dataclass(frozen=True)
class Generation:
    """As `pipeline.runtime.calls.Generation`, without torch."""

    tokens: list[int]
    text: str
    steps: int = 0
    finish_reason: str = "stop"
    emitted_per_step: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class NoRules:
    """As `pipeline.runtime.rules.Rules` of a model without any, without torch."""


class Engine:
    """Always gives the same answer."""

    def __init__(self, folder: Path) -> None:
        self.text, self.manifest, self.defaults = Text(folder), SimpleNamespace(sampling=("greedy",)), None

    def choice(self, *_: Any) -> None:
        pass

    def rules(self) -> NoRules:
        return NoRules()

    def new_tokens(self, prompt: int, limit: int | None) -> int:
        return limit or prompt

    def generate(self, prompts: list[list[int]], *, on_tokens: Any, **_: Any) -> list[Generation]:
        Path(os.environ["TANDEM_TEST_TOKENS"]).write_text(json.dumps(prompts), encoding="utf-8")
        tokens = self.text.encode(ANSWER, special=False)
        if on_tokens is not None:
            on_tokens(0, tokens)
        return [Generation(tokens, self.text.decode(tokens))]


if __name__ == "__main__":
    run.load = lambda folder, _: Engine(folder)  # type: ignore[assignment]
    run.gate_warning = lambda _: None  # type: ignore[assignment]
    run.settings_lines = lambda *_, **__: iter(())  # type: ignore[assignment]
    run.artifact_dir = Path
    sys.argv[0] = "tandem"
    main()
