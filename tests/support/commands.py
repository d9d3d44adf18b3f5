"""Run the command line in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from pipeline.cli.main import main

RECIPE = """\
name: mine
target: {source: ./target}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2]}
shapes: {batch: [1], prefill: [16], kv: [32]}
"""


def invoke(*arguments: str | Path, **options: Any) -> Result:
    """Run `tandem` with these arguments; stdout and stderr are apart."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def answer(*arguments: str | Path) -> Result:
    """As `invoke`, of a command that must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result
