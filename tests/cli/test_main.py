"""The command line: what users see and scripts rely on. Bad input: one message, an exit code, no leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline.cli.console import Stream
from pipeline.cli.main import main
from pipeline.files.atomic import TEMP
from support import small_artifacts as small
from support.checkpoints import CONFIG, random_weights, write_checkpoint
from support.families import write_tokenizer
from support.hub_server import Repo, running
from support.processes import heed_interrupts, members, wait_for

TANDEM = "from pipeline.cli.main import main; main()"
RECIPE = """\
name: mine
target: {source: ./target}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2]}
shapes: {batch: [1], prefill: [16], kv: [32]}
"""


def invoke(*arguments: str | Path, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], **options)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder with a good recipe and its target, where commands run; nothing is cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    write_checkpoint(tmp_path / "target", vocab_size=400)
    write_tokenizer(tmp_path / "target", "json")
    return tmp_path


def refused(work: Path, code: int, *said: str) -> str:
    """Build the recipe: one message with all of `said` and a fix, an exit code, nothing half-written."""
    result = invoke("build", "mine.yaml", "--out", "out")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert "  fix: " in result.stderr
    missing = [text for text in said if text not in result.stderr]
    assert not missing, result.stderr
    assert not (work / "out").exists()
    assert not list(work.rglob(f"{TEMP}*"))
    assert not list(work.rglob("*.pt2"))
    assert not list(work.glob("cache/shards/*/weights"))
    assert result.stdout == ""
    return result.stderr


RECIPE_FAULTS = {
    "unknown key": ("kv:", "kvs:", "mine.yaml:5: shapes.kvs: unknown key"),
    "wrong type": ("batch: [1]", "batch: one", "mine.yaml:5: shapes.batch"),
    "negative bucket": ("[16]", "[-16]", "found -16"),
    "unsorted bucket": ("[16]", "[16, 8]", "not ascending"),
    "K larger than a bucket": ("[2]", "[40]", "found K=40, whose step of 41 tokens does not fit the kv bucket 32"),
    "ranks that do not divide": ("name: mine", "name: mine\nparallel: {tensor: 3}", "found 3, which does not divide"),
    "unknown backend": ("name: mine", "name: mine\nbackend: {name: cuda}", "accepted: inductor, neuron"),
    "unknown layer": ("[0]", "[7]", "the target has no layer 7"),
    "unknown source": (
        "./target",
        "ftp://x",
        "mine.yaml:2: target.source: found 'ftp://x'; accepted: a folder, or one of hf://",
    ),
    "no such folder": ("./target", "./nowhere", "no such folder"),
    "no such package": ("./target", "package://nothing", "a package needs an exact version"),
    "prompts that are not there": (
        "name: mine",
        "name: mine\nvalidate: {prompts: p.jsonl, max_new_tokens: 8}",
        "p.jsonl: cannot read prompts",
    ),
}


@pytest.mark.parametrize("fault", RECIPE_FAULTS)
def test_build_refuses_a_bad_recipe(work, fault):
    old, new, said = RECIPE_FAULTS[fault]
    assert old in RECIPE
    (work / "mine.yaml").write_text(RECIPE.replace(old, new))
    refused(work, 2, said)


def _without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


NORM = "model.norm.weight"
WEIGHT_FAULTS = {
    "missing weight": (lambda w: _without(w, NORM), f"missing weight {NORM} [32]"),
    "extra weight": (lambda w: w | {"model.extra": torch.ones(3)}, "extra weight model.extra [3]"),
    "wrong shape": (lambda w: w | {NORM: torch.ones(31)}, f"wrong shape of {NORM} in model.safetensors: [31]"),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_build_refuses_weights_that_do_not_fit(work, fault):
    change, said = WEIGHT_FAULTS[fault]
    config = CONFIG | {"vocab_size": 400}
    write_checkpoint(work / "target", change(random_weights(config)), vocab_size=400)
    refused(work, 2, f"target: {said}")


def test_build_refuses_truncated_weights(work):
    file = work / "target" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    refused(work, 2, "model.safetensors: file is truncated", "download the checkpoint again")


def test_build_refuses_another_tokenizer_and_says_how_it_differs(work):
    (work / "mine.yaml").write_text(RECIPE.replace("{derive: {from: target, layers: [0]}}", "{source: ./draft}"))
    write_checkpoint(work / "draft", vocab_size=400)
    write_tokenizer(work / "draft", "json")
    file = work / "draft" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(data))
    refused(work, 2, "its tokenizer differs from the target's", "2 ids differ", "'a' against 'b'", "source: draft: ")


def test_build_refuses_a_target_without_a_tokenizer(work):
    for path in work.glob("target/tokenizer*"):
        path.unlink()
    refused(work, 2, "the target has no tokenizer", "tokenizer.json")


def test_build_refuses_a_broken_tokenizer_before_it_compiles(work):
    (work / "target" / "tokenizer.json").write_text('{"model": {}}')
    refused(work, 2, "its tokenizer cannot be read")


def test_build_refuses_an_unknown_revision(work, monkeypatch):
    with running() as hub:
        hub.repos["org/model"] = Repo({"config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        (work / "mine.yaml").write_text(RECIPE.replace("./target", "hf://org/model@v9"))
        refused(work, 2, "hf://org/model@v9: no such revision: 'v9'")


def test_build_without_a_network_is_the_environments_fault(work, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (work / "mine.yaml").write_text(RECIPE.replace("./target", "hf://org/model@main"))
    refused(work, 3, "no connection to the Hub", "HF_ENDPOINT")


def test_build_without_a_compiler_is_the_environments_fault(work, monkeypatch):
    monkeypatch.setenv("PATH", str(work))
    refused(work, 3, "backend.name: inductor needs a C++ compiler; 'g++' is not on PATH", "install g++")


def test_build_without_space_is_the_environments_fault(work):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
    done = subprocess.run(
        [sys.executable, "-c", limit + TANDEM, "build", "mine.yaml", "--out", "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "cannot write: File too large" in done.stderr
    assert "fix: " in done.stderr
    assert not (work / "out").exists()
    assert not list(work.rglob(f"{TEMP}*"))


def test_build_into_a_folder_of_something_else_is_refused(work):
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("")
    result = invoke("build", "mine.yaml", "--out", "out")
    assert result.exit_code == 2
    assert "holds something else than an artifact" in result.stderr
    assert [path.name for path in (work / "out").iterdir()] == ["thesis.txt"]


def test_build_of_an_unknown_recipe_names_what_there_is(work):
    (work / "recipes").mkdir()
    (work / "recipes" / "mine.yaml").write_text(RECIPE)
    result = invoke("build", "mien")
    assert result.exit_code == 2
    assert "did you mean 'mine'?" in result.stderr


def test_neuron_recipe_says_what_is_missing_here(work):
    (work / "mine.yaml").write_text(RECIPE + "backend: {name: neuron, target: trn2}\n")
    refused(work, 3, "neuronx", "fix: pip install")


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
    assert "fix: make build RECIPE=mine" in invoke("inspect", "mine").stderr


def commands(group: Any = main, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]
    return found


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_takes_json_quiet_and_verbose(path):
    text = invoke(*path, "--help").output
    assert "--json" in text
    assert "-q, --quiet" in text
    assert "-v, --verbose" in text


@pytest.mark.parametrize("arguments", [("-v", "inspect", "x"), ("inspect", "x", "-v")])
def test_verbose_shows_the_traceback(work, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "no artifact 'x'" in result.stderr


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


def test_build_interrupted_ends_at_once_with_130(work):
    """Ctrl-C goes to the whole process group; workers and compilers end, and what was finished stays."""
    child = subprocess.Popen(
        [sys.executable, "-c", TANDEM, "build", "mine.yaml", "--out", "out", "--workers", "1"],
        stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    wait_for(lambda: any(work.glob("cache/logs/mine/*.log")), 120)
    os.killpg(child.pid, signal.SIGINT)
    started = time.monotonic()
    rest = child.communicate(timeout=60)[1]
    assert child.returncode == 130, rest
    assert time.monotonic() - started < 20
    assert "interrupted; run the same command to continue" in rest
    assert "Traceback" not in rest
    assert not (work / "out").exists()
    wait_for(lambda: not members(child.pid))


def test_progress_off_a_terminal_is_plain_lines(work, capfd):
    """No control codes, and -q leaves nothing but the result."""
    from pipeline.cli.console import Console

    console = Console()
    for done in range(3):
        console.progress("shard", done, 2)
    console.log("package")
    console.close()
    Console(quiet=True).log("nothing")
    captured = capfd.readouterr()
    assert captured.err == "package\n"
    assert captured.out == ""


def test_progress_on_a_terminal_is_a_bar():
    """Lines stay above the bar, and the bar is gone at the end."""
    code = (
        "import time\nfrom pipeline.cli.console import Console\nc = Console()\nc.progress('shard', 1, 2)\n"
        "time.sleep(0.5)\nc.say('package [x]')\n"
        "c.progress('shard', 2, 2)\nc.close()"
    )
    ours, theirs = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env=env)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "shard" in shown
    assert "50%" in shown
    assert "package [x]\r\n" in shown
    assert "\x1b[2K" in shown, "the bar was never taken away"


def test_transfer_tells_bytes_and_time_left(monkeypatch, capsys):
    """Where no bar can be drawn, a plain line now and then."""
    from pipeline.cli import console

    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    moved = console.Console().transfer("pull")
    for second in range(0, 41, 4):
        now[0] = float(second)
        moved(second * console.MIB, 40 * console.MIB)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["  pull: 12.0 of 40.0 MiB, 28 s left", "  pull: 24.0 of 40.0 MiB, 16 s left",
                     "  pull: 36.0 of 40.0 MiB, 4 s left"]  # fmt: skip


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
        (("cache", "gc", "--max-gib", "nan"), 2, "nan is no amount"),
        (("cache", "gc", "--max-gib", "-1"), 2, "not in the range"),
        (("gc", "nowhere"), 2, "the registry is empty"),
        (("pull", "r/small@latest", "/proc"), 2, "a mount point"),
        (("pull", "r/small@latest", "/proc/nothing"), 3, "/proc/"),
        (("pull", "r/small@latest", "p", "--only", "weight"), 2, "no file matches weight/*"),
        (("diff", "r/variants/small@1", "out", "--variant", "typo"), 2, "unknown variant 'typo'"),
        (("inspect", "deep"), 2, "damaged manifest"),
        (("recipe", "check", "elsewhere.yaml"), 3, "unsupported kind of registry: gs://"),
        (("recipe", "check", "unprompted.yaml"), 2, "none.jsonl: cannot read prompts"),
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


def test_ls_of_nothing_says_so(work):
    result = invoke("ls", "nowhere")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing is published in nowhere" in result.stderr
    assert not (work / "nowhere").exists()


def test_pull_and_verify_a_part(work):
    small.make_validated(work / "out", work / "work")
    assert invoke("publish", "out", "--to", "r", "--alias", "latest").exit_code == 0
    assert invoke("pull", "r/small@latest", "p", "--only", "weights").exit_code == 0
    assert "missing" in invoke("verify", "p").stderr
    part = invoke("verify", "p", "--only", "weights")
    assert part.exit_code == 0, part.stderr
    assert "small" in part.stdout
    assert invoke("pull", "r/small@latest", "p", "--only", "wheights").exit_code == 2
    assert invoke("verify", "p", "--only", "weights").exit_code == 0, "a wrong part must not replace a right one"


def test_stream_shows_every_character_once():
    text = "Hello wörld 🎉"
    data = text.encode()
    stream = Stream(lambda tokens: bytes(tokens).decode(errors="replace"))
    shown = [stream.push(list(data[i : i + 3])) for i in range(0, len(data) - 1, 3)]
    assert all("\ufffd" not in part for part in shown)
    cut = "".join(shown) + stream.rest()
    assert cut == bytes(data[: len(shown) * 3]).decode(errors="replace")
