"""The failure tree. Every error a user can fix is a `TandemError`: where, what, fix, and the exit code.

    TandemError
    ├── GateError          1   a validation gate failed
    ├── InputError         2   wrong input: a recipe, a checkpoint, an artifact, an argument
    │   ├── RecipeError        one or more problems in a recipe, reported together
    │   ├── SourceError        weights or tokenizer that cannot be used
    │   └── ArtifactError      an artifact or release that must not be trusted
    └── HostError         3   toolchain, device, network, disk
        └── PreflightError       one or more missing requirements, reported together

Anything else that escapes is a bug in Tandem. This module does not print; the command line does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_CHARACTERS = 60
"""Limit for a string that a fix shows."""


@dataclass(frozen=True)
class Problem:
    """One finding in a recipe or plan: `where` is `file:line: key`."""

    where: str
    what: str
    fix: str = ""


class TandemError(Exception):
    """A failure with a remedy: `where` it is, `what` is wrong, and what to do (`fix`)."""

    exit_code = 2
    title = "error"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        self.problems: tuple[Problem, ...] = (Problem(where, what, fix),)
        super().__init__(f"{where}: {what}" if where else what)


class GateError(TandemError):
    """A validation gate failed; the artifact stays unpublished."""

    exit_code = 1
    title = "gate failed"


class InputError(TandemError):
    """An input that cannot be used as it is."""

    title = "wrong input"


class RecipeError(InputError):
    """All problems of a recipe."""

    title = "recipe"

    def __init__(self, problems: Sequence[Problem]) -> None:
        first, *_ = problems
        super().__init__(first.what, where=first.where, fix=first.fix)
        self.problems = tuple(problems)


class SourceError(InputError):
    """A checkpoint, tokenizer or draft that is missing, damaged, unsupported or does not fit its pair."""

    title = "source"


class ArtifactError(InputError):
    """An artifact or release that does not verify, does not match this host, or must not be overwritten."""

    title = "artifact"


class HostError(TandemError):
    """A missing requirement of the machine: a compiler, a device, a package, the network, disk space."""

    exit_code = 3
    title = "environment"


class PreflightError(HostError):
    """All missing requirements of a machine."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first, *_ = problems
        super().__init__("; ".join(problem.what for problem in problems), where=first.where, fix=first.fix)
        self.problems = tuple(problems)


def no_string(value: object, where: str, items: str) -> None:
    """Reject a string where a list of `items` is expected: Python takes it for the list of its characters.

    Raises:
        InputError: `value` is text or bytes; `where` names the parameter.

    """
    if isinstance(value, str | bytes):
        shown = json.dumps(value[:SHOWN_CHARACTERS] if isinstance(value, str) else "...", ensure_ascii=False)
        raise InputError(f"found a string, expected a list of {items}", where=where, fix=f"write [{shown}]")


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, for our own messages; never the name of its class."""
    if isinstance(error, KeyError):
        return f"missing key: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    return next(iter(str(error).strip().splitlines()), "no details")
