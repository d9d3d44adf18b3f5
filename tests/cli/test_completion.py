"""completion: a script for each shell, installed once by one command."""

from __future__ import annotations

import json

import pytest
from click.shell_completion import ShellComplete

from pipeline.cli.main import main
from support import small_artifacts as small
from support.commands import answer, invoke


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/usr/bin/bash")
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(home, shell):
    assert "_TANDEM_COMPLETE" in answer("completion", shell).stdout
    assert not list(home.iterdir())


def test_completion_install_adds_its_line_once(home):
    (home / ".bashrc").write_text("alias a=b")
    for _ in range(2):
        assert "start a new shell" in answer("completion", "--install").stdout
    script = home / ".local/share/tandem/completion.bash"
    assert (home / ".bashrc").read_text() == f"alias a=b\n. '{script}'\n"
    assert "_tandem_completion" in script.read_text()


def test_completion_of_fish_needs_no_line(home):
    data = json.loads(answer("completion", "fish", "--install", "--json").stdout)
    assert data == {"shell": "fish", "written": [str(home / ".config/fish/completions/tandem.fish")]}


def test_completion_of_an_unknown_shell_names_the_known_ones(home, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    result = invoke("completion")
    assert result.exit_code == 2
    assert "found $SHELL='tcsh'" in result.stderr
    assert "bash, zsh, fish" in result.stderr


def completed(*words: str) -> list[str]:
    """What a shell offers for the last word, without files."""
    *before, last = words
    shell = ShellComplete(main, {}, "tandem", "_TANDEM_COMPLETE")
    return [item.value for item in shell.get_completions(before, last) if item.type == "plain"]


def test_completion_knows_the_names_of_recipes_and_artifacts(tmp_path, monkeypatch):
    """`tandem build a<TAB>` and `tandem inspect <TAB>` offered nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("acme", "other"):
        (tmp_path / "recipes" / f"{name}.yaml").touch()
    small.make(tmp_path / "artifacts/small", tmp_path / "work")
    for command in (("build",), ("plan",), ("recipe", "check"), ("recipe", "lock"), ("tune",), ("doctor",)):
        assert completed(*command, "a") == ["acme"], command
        assert completed(*command, "") == ["acme", "other"], command
    for command in ("inspect", "verify", "diff", "report", "run", "publish", "sign", "serve", "bench", "validate"):
        assert completed(command, "") == ["small"], command
