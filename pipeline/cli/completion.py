"""The command that installs shell completion: completion."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from pipeline.cli.groups import Command
from pipeline.cli.options import as_json
from pipeline.cli.results import print_json, print_line
from pipeline.errors import InputError
from pipeline.files.atomic import write_atomic
from pipeline.files.home import expanded

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class _Place:
    """The path of a shell's completion script, and the startup file that must read it; fish needs none."""

    script: Path
    startup: Path | None


def _place(shell: str) -> _Place:
    home = expanded("~", "HOME")
    if shell == "fish":
        return _Place(home / ".config/fish/completions/tandem.fish", None)
    return _Place(home / f".local/share/tandem/completion.{shell}", home / f".{shell}rc")


@click.command(cls=Command)
@click.argument("shell", required=False, type=click.Choice(SHELLS))
@click.option("--install", is_flag=True, help="Write the script, and a line in the shell's startup file that reads it.")
@as_json
def completion(shell: str | None, install: bool, json_: bool) -> None:
    """Print or install a script for shell completion. SHELL is bash, zsh or fish (default: the shell in $SHELL)."""
    shell = shell or _own_shell()
    script = _script(click.get_current_context().find_root().command, shell)
    if not install:
        print_json({"shell": shell, "script": script}) if json_ else print_line(script)
        return
    place = _place(shell)
    written = _install(place, script)
    if json_:
        print_json({"shell": shell, "written": written})
        return
    print_line(f"installed the completion of {shell}: {place.script}; start a new shell to use it")


def _own_shell() -> str:
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        what = f"found $SHELL={name!r}" if name else "$SHELL is not set"
        raise InputError(what, where="SHELL", fix=f"name one of {', '.join(SHELLS)}: tandem completion bash")
    return name


def _script(command: click.Command, shell: str) -> str:
    kind = get_completion_class(shell)
    assert kind is not None, shell
    return kind(command, {}, "tandem", "_TANDEM_COMPLETE").source()


def _install(place: _Place, script: str) -> list[Path]:
    """Write the script and, once, the line that reads it; return the files that were written."""
    place.script.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place.script, script.encode())
    if place.startup is None:
        return [place.script]
    line = f". '{place.script}'"
    present = os.fsdecode(place.startup.read_bytes()) if place.startup.is_file() else ""
    if line in present.splitlines():
        return [place.script]
    with place.startup.open("ab") as file:
        file.write(os.fsencode(f"{'' if present.endswith(chr(10)) or not present else chr(10)}{line}\n"))
    return [place.script, place.startup]
