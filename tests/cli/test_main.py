"""The command line: what users see and scripts rely on. Bad input: one message, an exit code, no leftovers."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import click
import pytest
from click.testing import CliRunner

import pipeline
from pipeline.cli.main import COMMANDS, main
from pipeline.runtime.text import StreamDecoder
from support import small_artifacts as small
from support.commands import RECIPE, invoke
from support.python_source import nodes

TANDEM = "from pipeline.cli.main import main; main()"


@pytest.mark.parametrize("name", ["some/folder", "no-such-thing"])
def test_missing_artifact_is_not_told_to_be_built_from_a_recipe_that_does_not_exist(work, name):
    """`run some/folder` once said: fix: make build RECIPE=some/folder."""
    result = invoke("inspect", name)
    assert result.exit_code == 2
    assert f"no artifact '{name}'" in result.stderr
    assert "make build" not in result.stderr


def test_missing_artifact_of_a_recipe_is_told_to_be_built(work):
    (work / "recipes").mkdir()
    (work / "recipes" / "mine.yaml").write_text(RECIPE)
    assert "fix: tandem build mine" in invoke("inspect", "mine").stderr


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command that runs, by its words."""
    by_words = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        words = (*path, name)
        by_words |= commands(command, words) if isinstance(command, click.Group) else {words: command}
    return by_words


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_takes_json_quiet_and_verbose(path):
    text = invoke(*path, "--help").output
    assert "--json" in text
    assert "-q, --quiet" in text
    assert "-v, --verbose" in text


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_takes_the_parameters_that_click_passes(path):
    """An option without its field in the settings object would fail when the command is called."""
    command = commands()[path]
    function = inspect.unwrap(command.callback)
    hints = get_type_hints(function)
    names = [name for name in inspect.signature(function).parameters if name != "console"]
    if names == ["options"]:
        names = [field.name for field in dataclasses.fields(hints["options"])]
    assert sorted(names) == sorted(param.name for param in command.params if param.expose_value)


@pytest.mark.parametrize("lazy", COMMANDS, ids=lambda lazy: lazy.name)
def test_summary_is_the_first_sentence_of_the_help(lazy):
    """The table has it so that `tandem --help` imports no command."""
    assert lazy.load().name == lazy.name
    assert " ".join(lazy.load().help.split()).startswith(lazy.short_help)


def test_help_imports_no_command(work):
    code = (
        "import sys\nfrom pipeline.cli.main import main\nmain(['--help'], standalone_mode=False)\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name for name in done.stdout.split() if name.startswith("pipeline.")}
    assert modules == {"pipeline.errors", "pipeline.progress", "pipeline.threads", "pipeline.cli"} | {
        f"pipeline.cli.{name}" for name in ("main", "console", "groups", "usage", "utf8")
    }
    assert "pydantic" not in done.stdout.split()


def test_completion_lists_commands_and_their_summaries(monkeypatch):
    monkeypatch.setenv("COMP_WORDS", "tandem p")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = CliRunner().invoke(main, prog_name="tandem", complete_var="_TANDEM_COMPLETE",
                              env={"_TANDEM_COMPLETE": "zsh_complete"})  # fmt: skip
    words = done.stdout.splitlines()
    assert words[1::3] == ["plan", "publish", "pull"]
    assert words[2::3] == [lazy.short_help for name in words[1::3] for lazy in COMMANDS if lazy.name == name]


def test_an_unknown_command_names_the_nearest():
    result = invoke("biuld")
    assert result.exit_code == 2
    assert "Did you mean 'build'?" in result.stderr


PRINTS = {"print", "exit", "quit", "input", "SystemExit", "sys.exit", "sys.stdout.write", "sys.stderr.write"}
PRINT_PREFIXES = ("click.", "rich.", "os._exit", "os.exec", "os.abort")
PRINTS_ALLOWED = {
    "serve/parent.py": {"os._exit"},  # ends the engine's process of vLLM after the server's was killed
    "serve/platform.py": {
        "SystemExit",
        "sys.stderr.write",
    },  # runs in vLLM's process, where this is how a plugin ends the start
}


def prints(source: str) -> set[str]:
    """Names of what a module calls or raises to print or to end the process."""
    calls = {ast.unparse(node.func) for node in nodes(source) if isinstance(node, ast.Call)}
    calls |= {ast.unparse(node.exc) for node in nodes(source) if isinstance(node, ast.Raise) and node.exc}
    return {name for name in calls if name in PRINTS or name.startswith(PRINT_PREFIXES)}


PRINTING = ["print(1)", "import sys; sys.exit(1)", "import click; click.echo('')", "import os; os.execve('a', [], {})",
            "raise SystemExit", "raise SystemExit('x')", "import sys; sys.stderr.write('')"]  # fmt: skip


@pytest.mark.parametrize("source", PRINTING)
def test_prints_finds_what_prints(source):
    assert prints(source)


def test_only_the_room_cli_prints_or_exits():
    """CONTRIBUTING said that only `cli.py` does; nothing checked it."""
    package = Path(pipeline.__file__).parent
    printing = {
        path.relative_to(package).as_posix(): names
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "cli" and (names := prints(path.read_text()))
    }
    assert printing == PRINTS_ALLOWED


@pytest.mark.parametrize("arguments", [("-v", "inspect", "x"), ("inspect", "x", "-v")])
def test_verbose_shows_the_traceback(work, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "no artifact 'x'" in result.stderr


@pytest.mark.parametrize(
    ("words", "where", "says", "fix"),
    [
        (("run", "x"), "--prompt", "missing", "tandem run --help"),
        (("inspect",), "ARTIFACT", "missing", "tandem inspect --help"),
        (("--json", "ls", "r"), "--json", "not an option of `tandem`", "tandem COMMAND --json"),
        (("ls", "r", "--jsn"), "--jsn", "no such option", "did you mean --json?"),
        (("help",), "tandem", "no such command 'help'", "tandem --help"),
        (("cache", "gc", "--max-gib", "x"), "--max-gib", "'x' is not a valid float range", "tandem cache gc --help"),
        (("ls", "r", "s"), "tandem ls", "got unexpected extra argument (s)", "tandem ls --help"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_has_where_what_and_fix(words, where, says, fix):
    """It was `Error: Missing option '--prompt'.`, without a fix."""
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"wrong input: {where}: {says}")
    assert fix in result.stderr.splitlines()[1]
    assert "Usage" not in result.output


def test_json_results_are_json_alone(work, tmp_path):
    small.make_validated(tmp_path / "out", tmp_path / "work")
    for arguments in (
        ("inspect", "out"), ("verify", "out"), ("diff", "out", "out"), ("cache", "stats"),
        ("cache", "gc", "--max-gib", "1"),
        ("recipe", "schema"), ("recipe", "check", "mine.yaml"), ("plan", "mine.yaml"), ("publish", "out", "--dry-run"),
        ("publish", "out", "--to", "r", "--alias", "prod"), ("ls", "r"), ("alias", "list", "r/small"),
        ("alias", "history", "r/small@prod"), ("pull", "r/small@prod", "p"), ("diff", "r/small@prod", "out"),
        ("alias", "set", "r/small@prod", "next"), ("gc", "r", "--dry-run"), ("recipe", "changed", "mine.yaml"),
    ):  # fmt: skip
        result = invoke(*arguments, "--json")
        assert result.exit_code == 0, (arguments, result.stderr)
        json.loads(result.stdout)
    assert json.loads(invoke("verify", "out", "--json").stdout)["files"] > 3


NO_TORCH = [
    ("--help",), ("build", "--help"), ("inspect", "out"), ("verify", "out"), ("diff", "out", "out"), ("cache", "stats"),
    ("cache", "gc", "--max-gib", "1"), ("recipe", "schema"), ("recipe", "check", "mine.yaml"), ("plan", "mine.yaml"),
    ("publish", "out", "--to", "r", "--alias", "prod"), ("pull", "r/small@prod", "p"), ("ls", "r"), ("gc", "r"),
]  # fmt: skip


EXTRAS = ("torch", "numpy", "transformers", "safetensors", "tokenizers", "huggingface_hub", "obstore", "model_signing")


def test_help_of_every_command_needs_no_extra():
    source = (
        "import sys\nfrom pipeline.cli.main import main\n"
        f"for name in {EXTRAS!r}: sys.modules[name] = None\n"
        f"for words in {sorted(commands())!r}: main([*words, '--help'], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--json") >= len(commands())


def test_commands_that_need_no_torch_import_none(work, tmp_path):
    small.make_validated(tmp_path / "out", tmp_path / "work")
    source = (
        "import sys\nfrom pipeline.cli.main import main\n"
        f"for arguments in {NO_TORCH!r}:\n"
        "    try:\n        main(list(arguments))\n"
        "    except SystemExit as end:\n        assert not end.code, (arguments, end.code)\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once():
    """Under 0.3 s of processor time; the best of five, since other processes only ever add."""
    spent = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", TANDEM, "--help"], capture_output=True, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.3, spent


def test_a_share_of_no_start_is_an_error():
    result = invoke("distill", "pico-spec", "--start-share", "0.2")
    assert result.exit_code == 2
    assert "--start-share: found 0.2 without --start" in result.stderr
    assert "fix: name a draft: --start PATH" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("publish", "out", "--to", "r", "--version", "a b"), 2, "malformed version: 'a b'"),
        (("publish", "out", "--to", "r", "--version", ""), 2, "malformed version: ''"),
        (("bench", "out", "--prompts", "0"), 2, "0 is not in the range"),
        (("cache", "gc", "--max-gib", "nan"), 2, "nan is not a number"),
        (("cache", "gc", "--max-gib", "-1"), 2, "not in the range"),
        (("gc", "nowhere"), 2, "nowhere: no such folder"),
        (("pull", "r/small@latest", "/proc"), 2, "a mount point"),
        (("pull", "r/small@latest", "/proc/nothing"), 3, "/proc/"),
        (("pull", "r/small@latest", "p", "--only", "weight"), 2, "no file matches 'weight/*'"),
        (("diff", "r/variants/small@1", "out", "--variant", "typo"), 2, "unknown variant 'typo'"),
        (("inspect", "deep"), 5, "damaged manifest"),
        (("recipe", "check", "elsewhere.yaml"), 3, "unsupported kind of registry: gs://"),
        (("recipe", "check", "unprompted.yaml"), 2, "unprompted.yaml:6: validate.prompts: no such file: none.jsonl"),
        (("recipe", "check", "long.yaml"), 2, "at most 100 characters"),
    ],
)
def test_bad_input_is_one_clear_error(work, arguments, code, said):
    made = small.make_validated(work / "out", work / "work").root
    for place, *version in (("r",), ("r/variants", "--version", "1")):
        assert invoke("publish", made, "--to", place, "--alias", "latest", *version).exit_code == 0
    (work / "deep").mkdir()
    (work / "deep" / "manifest.json").write_text("[" * 100_000)
    (work / "elsewhere.yaml").write_text(RECIPE + "publish: [{to: 'gs://bucket'}]\n")
    (work / "unprompted.yaml").write_text(RECIPE + "validate: {prompts: none.jsonl, max_new_tokens: 8}\n")
    (work / "long.yaml").write_text(RECIPE.replace("mine", "m" * 101))
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_pull_and_verify_a_part(work):
    small.make_validated(work / "out", work / "work")
    assert invoke("publish", "out", "--to", "r", "--alias", "latest").exit_code == 0
    assert invoke("pull", "r/small@latest", "p", "--only", "weights").exit_code == 0
    assert "only a part was pulled (--only weights)" in invoke("verify", "p").stderr
    part = invoke("verify", "p", "--only", "weights")
    assert part.exit_code == 0, part.stderr
    assert "small" in part.stdout
    assert invoke("pull", "r/small@latest", "p", "--only", "wheights").exit_code == 2
    assert invoke("verify", "p", "--only", "weights").exit_code == 0, "a wrong part must not replace a right one"


def test_stream_shows_every_character_once():
    text = "Hello wörld 🎉"
    data = text.encode()
    stream = StreamDecoder(lambda tokens: bytes(tokens).decode(errors="replace"))
    shown = [stream.push(list(data[i : i + 3])) for i in range(0, len(data) - 1, 3)]
    assert all("\ufffd" not in part for part in shown)
    cut = "".join(shown) + stream.rest()
    assert cut == bytes(data[: len(shown) * 3]).decode(errors="replace")


def test_inspect_json_has_what_scripts_ask_for(tmp_path):
    """The manifest keeps facts of the pair and of graphs; K, buckets and ranks follow from them."""
    root = small.make(tmp_path / "out", tmp_path / "work").root
    shown = json.loads(CliRunner().invoke(main, ["inspect", str(root), "--json"]).stdout)
    assert shown["kind"] == "pair"
    assert (shown["tensor"], shown["draft_tokens"], shown["sampling"]) == (1, [2], ["greedy"])
    assert shown["shapes"] == {"batch": [1], "prefill": [16], "kv": [32]}
    assert (shown["method"], shown["dtype"], shown["vocab"]) == ("draft_model", "float32", 64)


LONG = "x" * 5000


@pytest.mark.parametrize("words", [("inspect", LONG), ("build", LONG), ("pull", f"{LONG}/small@1", "out"),
                                   ("pull", "registry/small@1", LONG), ("recipe", "check", LONG)])  # fmt: skip
def test_a_word_longer_than_a_file_name_is_wrong_input(tmp_path, monkeypatch, words):
    """It was an error of the environment with 5,000 characters, and ended vLLM's plugin."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*words)
    assert result.exit_code == 2, result.stderr
    assert "no file can have this name of 50" in result.stderr
    assert len(result.stderr) < 400
