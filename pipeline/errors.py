"""The failure tree. Every error a user can fix is a `TandemError`: where, what, fix, and the exit code.

    TandemError
    ├── GateError          1   a validation gate failed
    ├── InputError         2   wrong input: a recipe, a checkpoint, an artifact, an argument
    │   ├── RecipeError        one or more problems in a recipe, reported together
    │   ├── SourceError        weights or tokenizer that cannot be used
    │   └── ArtifactError      an artifact or release that cannot be used
    │       ├── RefusedError  4   rejected by a policy, a required signature or a yank
    │       └── CorruptError  5   bytes that differ from their digest, or cannot be read
    └── HostError         3   toolchain, device, network, disk
        └── PreflightError       one or more missing requirements, reported together

Anything else that escapes is a bug in Tandem, exit code 70. This module does not print; the command line does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

SHOWN_CHARACTERS = 60
"""Limit for a string that a fix shows."""


@dataclass(frozen=True)
class Problem:
    """One finding in a recipe or plan: `where` is `file:line: key`."""

    where: str
    what: str
    fix: str = ""


KINDS = {1: "gate", 2: "input", 3: "environment", 4: "refused", 5: "corrupt", 70: "bug", 130: "interrupted"}
"""The kind of an error, by its exit code, for scripts."""
BUG_CODE, INTERRUPTED_CODE = 70, 130


class TandemError(Exception):
    """A failure with a remedy: `where` it is, `what` is wrong, and what to do (`fix`).

    Catch this class to catch all of them.
    """

    exit_code = 2
    title = "error"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        self.problems: tuple[Problem, ...] = (Problem(where, what, fix),)
        super().__init__(f"{where}: {what}" if where else what)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as it is, for workers: the arguments of `__init__` differ from class to class."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[TandemError], args: tuple[Any, ...], state: dict[str, Any]) -> TandemError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def as_data(problems: Sequence[Problem], exit_code: int) -> dict[str, Any]:
    """Return an error as `--json` prints it: its kind, exit code and problems."""
    shown = [{"where": each.where, "what": each.what, "fix": each.fix} for each in problems]
    return {"error": {"kind": KINDS[exit_code], "exit_code": exit_code, "problems": shown}}


class GateError(TandemError):
    """A validation gate failed, or an artifact without passed gates was to be published.

    The artifact and its report stay on disk. `tandem report ARTIFACT` shows the numbers of each gate. Correct the
    recipe or the sources and build again; an artifact whose gates never ran needs `tandem validate ARTIFACT`.
    """

    exit_code = 1
    title = "gate failed"


class InputError(TandemError):
    """An argument, option, file or setting that cannot be used.

    Correct the value that `where` names.
    """

    title = "wrong input"


class RecipeError(InputError):
    """All problems of a recipe, each with file, line and key.

    Edit the recipe; `tandem recipe check NAME` checks it without a build.
    """

    title = "recipe"

    def __init__(self, problems: Sequence[Problem]) -> None:
        first, *_ = problems
        super().__init__(first.what, where=first.where, fix=first.fix)
        self.problems = tuple(problems)


class SourceError(InputError):
    """A checkpoint, tokenizer or draft that is missing, damaged, unsupported or does not fit its pair.

    Correct `target.source` or `draft.source` in the recipe, or download the files again.
    """

    title = "source"


class ArtifactError(InputError):
    """An artifact or release that does not match this host or its command, or must not be overwritten.

    Nothing of the artifact was run. Use a host that has what `tandem inspect ARTIFACT` lists as needed, or another
    version.
    """

    title = "artifact"


class RefusedError(ArtifactError):
    """An artifact or release that a policy, a required signature or a yank rejects.

    Nothing was fetched or run. A retry fails again: use a release that the policy accepts, or change the policy. A
    release that was yanked names the reason.
    """

    exit_code = 4
    title = "refused"


class CorruptError(ArtifactError):
    """An artifact, release or blob whose bytes differ from their digest, or cannot be read.

    Nothing of the artifact was run. Pull or build it again; if the registry has the wrong bytes, ask the publisher to
    publish the release again.
    """

    exit_code = 5
    title = "corrupt"


class HostError(TandemError):
    """The machine lacks a compiler, a device, a package, credentials, a network connection or disk space.

    `tandem doctor` lists what is missing for a build. After a network failure, run the same command again: finished
    work is kept.
    """

    exit_code = 3
    title = "environment"


class PreflightError(HostError):
    """All things that a machine lacks for a build, each with its fix."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first, *_ = problems
        super().__init__("; ".join(problem.what for problem in problems), where=first.where, fix=first.fix)
        self.problems = tuple(problems)


_Failure = TypeVar("_Failure", bound=TandemError)


def together(errors: Sequence[_Failure]) -> _Failure:
    """Return the first of several errors, with the problems of all."""
    first, *others = errors
    first.problems += tuple(problem for error in others for problem in error.problems)
    return first


def no_string(value: object, where: str, items: str) -> None:
    """Reject a string where a list of `items` is expected: Python iterates over its characters.

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
