"""The C++ compiler that `CXX` names, with launchers and flags, for Inductor, which takes one word without spaces.

Also the words for its failures. Compiles nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import HostError, Problem, no_string
from pipeline.files.temporary import SAFE

if TYPE_CHECKING:
    from torch._inductor.cpp_builder import BuildOptionsBase

DEFAULT = "g++"
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "buildcache")
"""Commands that run the compiler behind them, and change no output."""

FAMILIES = {"clang": "clang++", "gcc": "g++", "intel": "icpx"}
"""Kind of compiler -> a name by which Inductor knows the kind."""
SIGNS = (("intel(r)", "intel"), ("clang", "clang"), ("free software foundation", "gcc"))
"""Part of the output of `--version`, in lower case -> the kind of compiler."""

VERSION = re.compile(r"\d+(\.\d+)*")
SHOWN_LINES = 4
ERROR = re.compile(r"\b(fatal error|error|undefined reference|cannot find|not found|No space left)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Identity:
    """What a compiler says of itself: its kind and version, or the fault of a command that is no compiler."""

    family: str = ""
    version: str = "missing"
    fault: str = ""


@dataclass(frozen=True)
class Compiler:
    """A command: launchers like ccache, the compiler, and its flags."""

    launchers: tuple[str, ...]
    name: str
    flags: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The command, with an absolute path for a relative one: Inductor runs it in other folders."""
        name = str(Path(self.name).absolute()) if os.sep in self.name else self.name
        return (*self.launchers, name, *self.flags)

    def identity(self) -> Identity:
        """Return kind and version."""
        return _identity(self.words, tuple(os.get_exec_path()))

    def fact(self) -> str:
        """Return the version, with the kind where it is not GCC: both shape a graph."""
        identity = self.identity()
        kind = "" if identity.family in ("gcc", "") else f"{identity.family} "
        return f"{kind}{identity.version}"

    def problems(self) -> list[Problem]:
        """Return the fault of a command that is no C++ compiler."""
        if fault := self.identity().fault:
            what = f"inductor needs a C++ compiler; {fault}"
            set_by_cxx = (os.environ.get("CXX") or "").strip()
            return [Problem("CXX" if set_by_cxx else "backend.name", what, _fix(bool(set_by_cxx)))]
        return []

    def executable(self, folder: Path) -> str:
        """Return one word that runs the command: its name, or a script in `folder`, where Inductor needs one."""
        family = self.identity().family
        is_plain = len(self.words) == 1 and SAFE.fullmatch(self.words[0]) and _family_of_name(self.name) == family
        if is_plain:
            return self.words[0]
        line = f'#!/bin/sh\nexec {shlex.join(self.words)} "$@"\n'
        script = folder / hashlib.sha256(line.encode()).hexdigest()[:16] / FAMILIES[family]
        if not script.is_file():
            script.parent.mkdir(parents=True, exist_ok=True)
            new = script.with_name(f"new-{os.getpid()}")
            new.write_text(line, encoding="utf-8")
            new.chmod(0o755)
            new.replace(script)  # whole and executable: other workers run it at the same time
        return str(script)


def from_environment() -> Compiler:
    """Return the compiler of `CXX`, or g++ where the variable is absent or blank.

    Raises:
        HostError: the variable has an open quote.

    """
    text = (os.environ.get("CXX") or "").strip() or DEFAULT
    if Path(text).name not in LAUNCHERS and shutil.which(text):
        return Compiler((), text)  # also a path with spaces
    try:
        words = shlex.split(text)
    except ValueError as error:
        what = f"found {text!r}, which has a quote that is not closed"
        raise HostError(what, where="CXX", fix="set CXX to a compiler, for example g++") from error
    behind = next((i for i, word in enumerate(words) if Path(word).name not in LAUNCHERS), len(words))
    launchers, rest = words[:behind], words[behind:] or [DEFAULT]
    return Compiler(tuple(launchers), rest[0], tuple(rest[1:]))


def use(compiler: Compiler, folder: Path) -> None:
    """Let Inductor use a compiler in this process, from now on; scripts are written in `folder`."""
    from torch._inductor import config, cpp_builder  # not at the top: the import takes seconds

    config.cpp.cxx = (None, compiler.executable(folder))
    cpp_builder.cpp_compiler_search.cache_clear()
    cpp_builder.BuildOptionsBase.get_libraries_dirs = _quoted_library_folders


def _quoted_library_folders(options: BuildOptionsBase) -> list[str]:
    """Return folders in quotes, which Inductor leaves out: torch may be installed in a path with spaces."""
    return [shlex.quote(folder) for folder in options._libraries_dirs]


@contextmanager
def explained(compiler: Compiler, fix: str = "") -> Iterator[None]:
    """Raise a failure of the C++ compiler as an error with its first error lines and its command.

    Raises:
        HostError: with `fix`, which a caller with a log adds later.

    """
    from torch._inductor.exc import CppCompileError, InductorError  # not at the top: the import takes seconds

    try:
        yield
    except (CppCompileError, InductorError) as error:
        cause = error.inner_exception if isinstance(error, InductorError) else error
        if not isinstance(cause, CppCompileError):
            raise
        raise HostError(failure(compiler, cause.cmd, cause.output), where="compile", fix=fix) from error


def failure(compiler: Compiler, command: list[str], output: str) -> str:
    """Return the first error lines of a compiler, and its command without most of the arguments."""
    no_string(command, "command", "words")
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.search(line)] or lines or ["no output"]
    source = next((word for word in command[1:] if word[:1] != "-" and Path(word).suffix), "")
    shown = "".join(f"\n    {line[:200]}" for line in errors[:SHOWN_LINES])
    more = f"\n    ... {len(errors) - SHOWN_LINES} more" if len(errors) > SHOWN_LINES else ""
    return f"the C++ compiler failed: `{shlex.join(compiler.words)} {source} ...`{shown}{more}"


@cache
def _identity(words: tuple[str, ...], path: tuple[str, ...]) -> Identity:  # noqa: ARG001 - programs differ by PATH
    """Run a command with `--version` and `-dumpversion`."""
    shown = shlex.join(words)
    for word in (words[0], *(word for word in words[1:2] if Path(words[0]).name in LAUNCHERS)):
        if shutil.which(word) is None:
            return Identity(fault=f"`{word}` is not on PATH" if os.sep not in word else f"no program `{word}`")
    banner = _output_of((*words, "--version"))
    family = next((kind for sign, kind in SIGNS if sign in banner.output.lower()), "")
    if banner.fault or not family:
        said = banner.fault or "it is none of GCC, Clang and Intel's compiler, by its `--version`"
        return Identity(fault=f"`{shown}` cannot be used: {said}")
    version = _output_of((*words, "-dumpfullversion", "-dumpversion"))
    if version.fault:
        version = _output_of((*words, "-dumpversion"))
    if version.fault or VERSION.fullmatch(version.output.strip()) is None:
        return Identity(fault=f"`{shown} -dumpversion` prints no version")
    return Identity(family, version.output.strip())


@dataclass(frozen=True)
class _Answer:
    output: str = ""
    fault: str = ""


def _output_of(command: tuple[str, ...]) -> _Answer:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=60,
            stdin=subprocess.DEVNULL, env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return _Answer(fault=str(error))
    if done.returncode:
        said = next((line for line in (done.stderr + done.stdout).splitlines() if line.strip()), "no output")
        return _Answer(fault=f"`{shlex.join(command[1:])}` ended with status {done.returncode}: {said}")
    return _Answer(done.stdout)


def _family_of_name(name: str) -> str:
    """Return the kind of compiler that Inductor takes a command for."""
    if re.search(r"clang", name):
        return "clang"
    return "gcc" if re.search(r"gcc|g\+\+|gnu-c\+\+", name) else "intel"


def _fix(set_by_cxx: bool) -> str:
    return "set CXX to a C++ compiler, or unset it for g++" if set_by_cxx else "install g++"
