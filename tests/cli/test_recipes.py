"""recipe check: what is ok was looked at, and what was not is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from pipeline import __version__
from pipeline.files.atomic import FileDigest, sha256_file
from pipeline.plan import lock as locks
from pipeline.recipe import load
from support.checkpoints import CONFIG, random_weights, write_checkpoint
from support.commands import RECIPE, answer, invoke
from support.families import write_tokenizer
from support.paths import ROOT

DERIVED = "{derive: {from: target, layers: [0]}}"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder with a recipe whose target lies beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    write_checkpoint(tmp_path / "target", vocab_size=400)
    write_tokenizer(tmp_path / "target", "json")
    return tmp_path


def test_check_of_local_sources_says_what_was_checked(work):
    line = "mine.yaml: ok: recipe, prompts, sources, plan of 5 graphs\n"
    assert answer("recipe", "check", "mine.yaml").stdout == line


def test_check_names_sources_that_were_not_checked(work):
    """It said `ok` of sources that it did not look at."""
    (work / "mine.yaml").write_text(RECIPE.replace("./target", "hf://org/model@v1"))
    shown = answer("recipe", "check", "mine.yaml").stdout
    assert shown == "mine.yaml: ok: recipe, prompts; sources not checked: hf://org/model@v1\n"
    data = json.loads(answer("recipe", "check", "mine.yaml", "--json").stdout)
    assert data["checked"] == ["mine.yaml"]
    assert data["sources_not_checked"] == {"mine.yaml": ["hf://org/model@v1"]}
    assert data["locks"] == {"mine.yaml": "none"}


def test_check_names_a_draft_that_was_not_checked(work):
    (work / "mine.yaml").write_text(RECIPE.replace(DERIVED, "{source: 'hf://org/draft@v1'}"))
    assert "; sources not checked: hf://org/draft@v1\n" in answer("recipe", "check", "mine.yaml").stdout


def no_folder(work: Path) -> None:
    shutil.rmtree(work / "target")


def no_shard(work: Path) -> None:
    (work / "target" / "model.safetensors").unlink()  # transformers reads it first
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (work / "target" / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(work: Path) -> None:
    file = work / "target" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_tokenizer(work: Path) -> None:
    (work / "target" / "tokenizer.json").unlink()


def missing_weight(work: Path) -> None:
    weights = random_weights(CONFIG | {"vocab_size": 400})
    weights.pop("model.norm.weight")
    write_checkpoint(work / "target", weights, vocab_size=400)


def another_tokenizer(work: Path) -> None:
    (work / "mine.yaml").write_text(RECIPE.replace(DERIVED, "{source: ./draft}"))
    shutil.copytree(work / "target", work / "draft")
    file = work / "draft" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(data))


def plain_model_as_eagle3(work: Path) -> None:
    text = RECIPE.replace(DERIVED, "{source: ./target}").replace("{draft_tokens", "{method: eagle3, draft_tokens")
    (work / "mine.yaml").write_text(text)


def ranks_that_do_not_divide(work: Path) -> None:
    (work / "mine.yaml").write_text(RECIPE + "parallel: {tensor: 3}\n")


FAULTS = {
    no_folder: "no such folder",
    no_shard: "model-00002-of-00002.safetensors",
    truncated: "file is truncated",
    no_tokenizer: "the target has no tokenizer",
    missing_weight: "missing weight model.norm.weight",
    another_tokenizer: "the draft's tokenizer differs from the target's",
    plain_model_as_eagle3: "eagle3",
    ranks_that_do_not_divide: "found 3, which does not divide",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_check_finds_faults_of_local_sources(work, fault):
    """All of these were `ok`."""
    fault(work)
    result = invoke("recipe", "check", "mine.yaml")
    assert result.exit_code == 2, result.output
    assert FAULTS[fault] in result.stderr
    assert "Traceback" not in result.output


def test_check_names_the_line_of_each_source_and_a_folder_with_a_similar_name(work):
    """A source error had no line and no key, and only the first of two was shown."""
    text = RECIPE.replace("./target", "./tarqet").replace(DERIVED, "{source: ./nothing}")
    (work / "mine.yaml").write_text(text)
    lines = invoke("recipe", "check", "mine.yaml").stderr.splitlines()
    assert lines == [
        "source: mine.yaml:2: target.source: tarqet: no such folder", "  fix: did you mean target?",
        "source: mine.yaml:3: draft.source: nothing: no such folder",
        "  fix: give a folder with config.json and *.safetensors",
    ]  # fmt: skip


def test_check_of_a_name_of_the_hub_says_how_to_write_it(work):
    (work / "mine.yaml").write_text(RECIPE.replace("./target", "Qwen/Qwen3-0.6B"))
    shown = invoke("recipe", "check", "mine.yaml").stderr
    assert "mine.yaml:2: target.source: Qwen/Qwen3-0.6B: no such folder" in shown
    assert "fix: for the Hub, write hf://Qwen/Qwen3-0.6B@REVISION" in shown


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[0]", "[0, 7]", "mine.yaml:3: draft.derive.layers: the target has no layer 7"),
        ("kv: [32]}", "kv: [32]}\nvalidate: {prompts: none.jsonl, max_new_tokens: 8}",
         "mine.yaml:6: validate.prompts: no such file: none.jsonl"),
    ],
)  # fmt: skip
def test_check_names_the_line_of_layers_and_prompts(work, old, new, says):
    (work / "mine.yaml").write_text(RECIPE.replace(old, new))
    assert says in invoke("recipe", "check", "mine.yaml").stderr


def test_check_names_the_line_of_a_draft_with_another_tokenizer(work):
    another_tokenizer(work)
    assert "source: mine.yaml:3: draft.source: " in invoke("recipe", "check", "mine.yaml").stderr


def test_check_shows_every_bad_line_of_the_prompts(work):
    (work / "p.jsonl").write_text('{"class": "chat", "prompt": "hi"}\nx\n{"prompt": "hi"}\n')
    (work / "mine.yaml").write_text(RECIPE + "validate: {prompts: p.jsonl, max_new_tokens: 8}\n")
    shown = invoke("recipe", "check", "mine.yaml").stderr
    assert "p.jsonl:2:1: not JSON" in shown
    assert "p.jsonl:3:1: missing key: `class`" in shown


def test_check_warns_of_prompts_that_a_build_would_cut(work):
    """All prompts were longer than what runs, and the answer was `ok` alone."""
    (work / "p.jsonl").write_text(json.dumps({"class": "story", "prompt": "a b c " * 20}) + "\n")
    (work / "mine.yaml").write_text(RECIPE + "validate: {prompts: p.jsonl, max_new_tokens: 8}\n")
    result = answer("recipe", "check", "mine.yaml")
    assert result.stderr.startswith("warning: 1 of 1 prompts do not fit a cache of 32 positions with 8 new tokens")
    assert result.stdout.startswith("mine.yaml: ok")


def test_check_looks_at_tiny_models(work):
    """`pico://gemma` needs no download, and was not looked at."""
    (work / "mine.yaml").write_text(RECIPE.replace("./target", "'pico://gemma'"))
    shown = invoke("recipe", "check", "mine.yaml").stderr
    assert "mine.yaml:2: target.source: pico://gemma: unknown family: 'gemma'" in shown
    (work / "mine.yaml").write_text(RECIPE.replace("./target", "'pico://llama?layers=2'"))
    assert (
        answer("recipe", "check", "mine.yaml").stdout == "mine.yaml: ok: recipe, prompts, sources, plan of 5 graphs\n"
    )


def locked(work: Path, **changes: object) -> None:
    """Write a lock of mine.yaml with the installed versions, and with changes."""
    recipe = load(work / "mine.yaml")
    source = locks.LockedSource(recipe.target.source, "r", {}, CONFIG)
    lock = locks.Lock(
        recipe.digest(), source, None, {"tandem": __version__, "torch": metadata.version("torch").partition("+")[0]}
    )
    locks.write(work / "mine.lock", replace(lock, **changes))


def test_check_says_that_the_lock_is_up_to_date(work):
    locked(work)
    assert answer("recipe", "check", "mine.yaml").stdout.endswith(
        ", plan of 5 graphs, lock up to date (recipe, versions, configs and sizes of weights)\n"
    )
    assert json.loads(answer("recipe", "check", "mine.yaml", "--json").stdout)["locks"] == {"mine.yaml": "up to date"}


def test_check_compares_files_of_sources_with_the_lock(work):
    """The model was another one, and the lock was said to be up to date."""
    path = work / "target/config.json"
    source = locks.LockedSource(
        "./target", "r", {"config.json": FileDigest(sha256_file(path), path.stat().st_size)}, CONFIG
    )
    locked(work, target=source)
    assert "lock up to date" in answer("recipe", "check", "mine.yaml").stdout
    path.write_text(path.read_text().replace("{", "{ ", 1))
    result = invoke("recipe", "check", "mine.yaml")
    assert result.exit_code == 2
    assert "mine.lock: target.files.config.json: locked sha256 " in result.stderr


def test_check_compares_sizes_of_weights_with_the_lock(work):
    """Names in a lock are compared with those of the folder, and no path of a lock is opened."""
    size = (work / "target/model.safetensors").stat().st_size
    for of_lock in (size, size + 1):
        files = {"model.safetensors": FileDigest("0" * 64, of_lock), "../mine.yaml": FileDigest("0" * 64, 1)}
        locked(work, target=locks.LockedSource("./target", "r", files, CONFIG))
        shown = invoke("recipe", "check", "mine.yaml")
        assert ("lock up to date" in shown.stdout) == (of_lock == size)
    assert f"target.files.model.safetensors: locked {size + 1} bytes, found {size}\n" in shown.stderr


@pytest.mark.parametrize(
    ("changes", "says", "fix"),
    [
        ({"recipe_sha256": "0"}, "mine.lock: recipe_sha256: the recipe was edited after the lock",
         "tandem recipe lock mine, or undo the edit"),
        ({"toolchain": {"torch": "1.0.0"}}, "mine.lock: toolchain.torch: locked 1.0.0, found", "tandem recipe lock"),
        ({"toolchain": {"tandem": "0.0.1"}}, "mine.lock: toolchain.tandem: locked 0.0.1, found", "tandem recipe lock"),
        ({"draft": locks.LockedSource("./draft", "r")}, "mine.lock: draft: locked ./draft", "tandem recipe lock mine"),
    ],
)  # fmt: skip
def test_check_compares_the_lock(work, changes, says, fix):
    """An edited recipe, another torch and a lock file of `{` were all `ok`."""
    locked(work, **changes)
    result = invoke("recipe", "check", "mine.yaml")
    assert result.exit_code == 2
    assert says in result.stderr
    assert fix in result.stderr


def test_check_shows_the_problems_of_prompts_sources_and_lock_together(work):
    """Each was shown after the one before it was corrected."""
    text = RECIPE.replace("./target", "./nowhere") + "validate: {prompts: none.jsonl, max_new_tokens: 8}\n"
    (work / "mine.yaml").write_text(text)
    (work / "mine.lock").write_text("{")
    shown = invoke("recipe", "check", "mine.yaml").stderr
    for place in ("mine.yaml:6: validate.prompts: ", "mine.yaml:2: target.source: ", "mine.lock:1:"):
        assert place in shown


def test_check_reads_a_damaged_lock(work):
    (work / "mine.lock").write_text("{")
    result = invoke("recipe", "check", "mine.yaml")
    assert result.exit_code == 2
    assert "mine.lock:" in result.stderr


def test_check_by_name_works_in_the_folder_of_recipes(work):
    """`tandem recipe check NAME` failed inside recipes/."""
    assert answer("recipe", "check", "mine").stdout.startswith("mine.yaml: ok")


def test_plan_shows_what_its_help_promises(work):
    shown = answer("plan", "mine.yaml").stdout
    assert "mine: 5 graphs for 1 rank\n" in shown
    assert shown.splitlines()[2].split() == ["graph", "time", "to", "compile", "memory", "to", "compile"]
    rows = [line.rsplit("about", 1)[0].strip() for line in shown.splitlines() if "about" in line]
    assert rows[5:] == [
        "sources", "shard", f"compile, {rows[7][9]} at a time", "package", "reference", "gates", "total",
        "memory of the host", "disk, without sources", "artifact",
    ]  # fmt: skip
    assert "the time, memory and disk that its build takes" in invoke("plan", "--help").stdout


def test_plan_simulates_a_cluster(work):
    """Longest first, four machines have at least 0.9 of the ideal on the pairs that ship."""
    simulated = json.loads(answer("plan", "mine.yaml", "--workers", "4", "--simulate", "--price", "2", "--json").stdout)
    assert [of["machines"] for of in simulated["simulated"]] == [1, 2, 4]
    assert simulated["build"]["workers"] == 4
    assert simulated["simulated"][0]["cost"] == pytest.approx(2 * simulated["simulated"][0]["seconds"] / 3600)
    for name in ("smollm2-135m-spec", "smollm2-135m-draft-model", "smollm2-135m-int8", "llama-70b-spec"):
        path = str(ROOT / "recipes" / f"{name}.yaml")
        last = json.loads(answer("plan", path, "--workers", "4", "--simulate", "--json").stdout)["simulated"][-1]
        assert last["efficiency"] >= 0.9, name
        assert last["cost"] is None
