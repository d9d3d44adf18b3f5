"""build: bad input is one message, an exit code, and no leftovers; an interruption ends at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.files.unfinished import TEMP
from pipeline.models.weights import NORM
from support.checkpoints import CONFIG, random_weights, write_checkpoint
from support.commands import RECIPE, invoke
from support.families import write_tokenizer
from support.hub_server import Repo, running
from support.processes import heed_interrupts, members, wait_for

TANDEM = "from pipeline.cli.main import main; main()"


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
    "K larger than a bucket": ("[2]", "[40]", "found K=40: a step of 41 tokens does not fit the kv bucket 32"),
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
        "mine.yaml:2: validate.prompts: no such file: p.jsonl",
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
    refused(
        work, 2, "the draft's tokenizer differs from the target's", "2 ids differ", "'a' against 'b'", "source: draft: "
    )


def test_build_refuses_a_target_without_a_tokenizer(work):
    for path in work.glob("target/tokenizer*"):
        path.unlink()
    refused(work, 2, "the target has no tokenizer", "tokenizer.json")


def test_build_refuses_a_broken_tokenizer_before_it_compiles(work):
    (work / "target" / "tokenizer.json").write_text('{"model": {}}')
    refused(work, 2, "cannot read the tokenizer")


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
    refused(work, 3, "backend.name: inductor needs a C++ compiler; `g++` is not on PATH", "install g++")


@pytest.mark.slow
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
    assert "not an artifact directory; not replaced" in result.stderr
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


@pytest.mark.compile
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


def test_out_for_several_recipes_is_rejected(work):
    (work / "other.yaml").write_text((work / "mine.yaml").read_text().replace("name: mine", "name: other"))
    result = invoke("build", "mine.yaml", "other.yaml", "--out", "out")
    assert result.exit_code == 2
    assert "--out: one directory for 2 recipes" in result.stderr


@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_executor_that_cannot_be_used_is_rejected(work, executor, monkeypatch):
    monkeypatch.delenv("TANDEM_REMOTE_CACHE", raising=False)
    result = invoke("build", "mine.yaml", "--executor", executor)
    assert result.exit_code == 2
    assert "  fix: " in result.stderr
    assert not (work / "artifacts").exists()
