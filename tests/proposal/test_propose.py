"""`tandem init`: recipes that check and plan, from configs alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.cli.main import main
from pipeline.errors import RecipeError
from pipeline.models.families import config_of
from pipeline.plan.plan import make_plan
from pipeline.proposal.choices import FILLED, Chosen, Pair, choose
from pipeline.proposal.known import drafts_of, known_drafts
from pipeline.proposal.text import commented
from pipeline.recipe import Recipe, load
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pico import Pico, write
from support.families import FAMILIES, write_pair
from support.hub_server import FakeHub, Repo, running
from support.mtp import write_target
from support.paths import ROOT

REASONED = (
    "target.dtype", "speculation.draft_tokens", "speculation.sampling", "shapes.batch", "shapes.prefill", "shapes.kv",
    "parallel.tensor", "backend", "validate.gates",
)  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a cache of its own."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with running() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield state


def tandem(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def written(*words: str) -> Recipe:
    """The recipe that a command writes, after `tandem recipe check`."""
    result = tandem("init", *words)
    assert result.exit_code == 0, result.output
    path = result.stdout.splitlines()[0].removeprefix("wrote ")
    checked = tandem("recipe", "check", path)
    assert checked.exit_code == 0, checked.output
    return load(Path(path))


def repository(tmp_path: Path, name: str, **options: int) -> Repo:
    """A tiny model as a repository of the Hub."""
    folder = tmp_path / "repositories" / name
    folder.mkdir(parents=True)
    write(Pico("qwen3", **options), folder)
    return Repo({path.name: path.read_bytes() for path in folder.iterdir()})


def test_init_of_a_tiny_model_checks_and_plans() -> None:
    recipe = written("pico://llama?layers=6")
    assert recipe.name == "llama-spec"
    assert recipe.draft.derive is not None
    assert recipe.draft.derive.layers == (0, 3, 5)
    assert (recipe.target.dtype, recipe.parallel.tensor, recipe.shapes.kv) == ("float32", 1, (2048,))


@pytest.mark.parametrize(("count", "method"), [(1, "mtp"), (0, "draft_model")])
def test_init_takes_the_module_that_a_target_states(tmp_path: Path, count: int, method: str) -> None:
    """As published configs of Qwen3.5 do."""
    write_target("qwen3.5", tmp_path / "models", mtp_num_hidden_layers=count)
    recipe = written("models/target", "--out", "recipe.yaml")
    assert recipe.speculation.method == method
    assert recipe.draft.derive is not None
    assert recipe.draft.derive.mtp is (True if count else None)


def test_init_states_the_reason_of_each_value(tmp_path: Path) -> None:
    result = tandem("init", "pico://llama", "--json")
    data = json.loads(result.stdout)
    assert {key for key in REASONED if key in data["values"]} <= set(data["reasons"])
    text = Path(data["recipe"]).read_text()
    assert all(reason.split(":")[0][:40] in text for reason in data["reasons"].values())


def test_init_of_a_folder_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    write(Pico("mistral", layers=2), tmp_path / "models" / "m")
    (tmp_path / "recipes").mkdir()
    assert written("models/m").target.source == "../models/m"
    assert (tmp_path / "recipes" / "m-spec.yaml").is_file()
    assert written("models/m", "--out", "beside.yaml").target.source == "./models/m"
    assert written(str(tmp_path / "models/m"), "--out", "a.yaml").target.source == str(tmp_path / "models/m")


def test_init_of_a_hub_model_downloads_no_weights_and_pins_its_commit(tmp_path: Path, hub: FakeHub) -> None:
    hub.repos["org/Some_Model"] = repo = repository(tmp_path, "m", layers=2)
    result = tandem("init", "hf://org/Some_Model")
    assert result.exit_code == 0, result.output
    recipe = load(Path("some_model-spec.yaml"))
    assert recipe.target.source == f"hf://org/Some_Model@{repo.commit}"
    assert not any(".safetensors" in line for line in hub.log)


def test_init_uses_the_table_of_known_drafts(tmp_path: Path, hub: FakeHub) -> None:
    """The first one that can be used: Qwen3 8B has a head, which is not on this Hub, and a sibling."""
    hub.repos["Qwen/Qwen3-8B"] = repository(tmp_path, "target", layers=3)
    hub.repos["Qwen/Qwen3-0.6B"] = repo = repository(tmp_path, "draft", layers=1)
    result = tandem("init", "hf://Qwen/Qwen3-8B")
    assert result.exit_code == 0, result.output
    assert "hf://RedHatAI/Qwen3-8B-speculator.eagle3: not used" in result.stderr
    recipe = load(Path("qwen3-8b-spec.yaml"))
    assert recipe.draft.source == f"hf://Qwen/Qwen3-0.6B@{repo.commit}"
    assert (recipe.speculation.method, recipe.speculation.draft_tokens) == ("draft_model", (5,))
    assert "seen in https://docs.vllm.ai/" in Path("qwen3-8b-spec.yaml").read_text()


@pytest.mark.parametrize(("name", "model_type", "ranks"), [
    ("qwen3-30b-a3b-spec", None, 4), ("gemma3-12b-spec", "gemma3", 2),
])  # fmt: skip
def test_init_proposes_the_pairs_of_the_recipes(
    tmp_path: Path, hub: FakeHub, name: str, model_type: str | None, ranks: int
) -> None:
    """From the published configs, with a tokenizer of this project; ranks and memory by the plan."""
    lock = json.loads((ROOT / "recipes" / f"{name}.lock").read_bytes())
    for role in ("target", "draft"):
        config, repo = lock[role]["config"], repository(tmp_path, role, layers=1)
        if model_type and role == "target":
            config = {"model_type": model_type, "text_config": config}
        hub.repos[lock[role]["source"].removeprefix("hf://").partition("@")[0]] = Repo(
            repo.files | {"config.json": json.dumps(config).encode()}
        )
    target, draft = (lock[role]["source"].partition("@")[0] for role in ("target", "draft"))
    result = tandem("init", target, "--backend", "neuron", "--target", "trn2", "--out", "new.yaml")
    assert result.exit_code == 0, result.output
    recipe = load(Path("new.yaml"))
    assert str(recipe.draft.source).partition("@")[0] == draft
    assert (recipe.target.dtype, recipe.parallel.tensor) == ("bfloat16", ranks)
    assert recipe.speculation.draft_tokens == (4,)


def test_init_of_a_head_that_the_user_names(tmp_path: Path) -> None:
    recipe = written("pico://llama?layers=6", "--draft", "pico://llama?layers=6&draft_vocab=128&eagle3=1")
    assert (recipe.speculation.method, recipe.speculation.draft_tokens) == ("eagle3", (3,))
    assert recipe.validate_.gates.tokens_per_step == 1.3  # with 1.0 a head that is right about nothing passes


def test_init_of_a_draft_with_another_tokenizer_is_rejected(tmp_path: Path) -> None:
    write_pair(FAMILIES["llama"], tmp_path)
    result = tandem("init", "pico://llama", "--draft", "./target")
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr
    assert not list(tmp_path.glob("*.yaml"))


def test_init_builds_the_graphs_that_requests_can_need() -> None:
    """A server of greedy graphs rejects every request with a temperature."""
    assert written("pico://llama").speculation.sampling == ("greedy", "stochastic", "shaped")
    recipe = written("pico://llama", "--backend", "neuron", "--out", "n.yaml")
    assert (recipe.speculation.candidates, recipe.backend.name) == (256, "neuron")
    assert recipe.speculation.sampling == ("greedy", "stochastic")


def test_init_takes_buckets_from_traffic(tmp_path: Path) -> None:
    lines = [{"prompt_tokens": 40, "completion_tokens": 60}] * 50 + [{"prompt_tokens": 700, "completion_tokens": 90}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    recipe = written("pico://llama?layers=6", "--traffic", "log.jsonl")
    assert recipe.shapes.kv[-1] == 896
    assert (recipe.shapes.prefill[0], recipe.shapes.prefill[-1]) == (64, 704)
    assert "51 requests of log.jsonl" in Path("llama-spec.yaml").read_text()


def test_init_never_overwrites(tmp_path: Path) -> None:
    Path("llama-spec.yaml").write_text("mine")
    for words in ((), ("--out", "llama-spec.yaml")):
        result = tandem("init", "pico://llama", *words)
        assert result.exit_code == 2
        assert "never overwritten" in result.stderr
        assert Path("llama-spec.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pico://llama", "--target", "trn2"), "option without --backend neuron"),
        (("pico://llama", "--out", "recipe.txt"), "found the suffix '.txt'"),
        (("pico://gpt2",), "unknown family: 'gpt2'"),
        (("nowhere",), "no such folder"),
        (("pico://llama", "--traffic", "none.jsonl"), "none.jsonl"),
    ],
)
def test_init_rejects(words: tuple[str, ...], said: str) -> None:
    result = tandem("init", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_init_of_an_unsupported_model_is_rejected(tmp_path: Path, hub: FakeHub) -> None:
    repo = repository(tmp_path, "m", layers=2)
    config = json.loads(repo.files["config.json"]) | {"quantization_config": {"quant_method": "hqq"}}
    hub.repos["org/m"] = Repo(repo.files | {"config.json": json.dumps(config).encode()})
    result = tandem("init", "hf://org/m")
    assert result.exit_code == 2
    assert 'quantization_config.quant_method="hqq"' in result.stderr
    assert not any(".safetensors" in line for line in hub.log)


def pair_of(recipe: str) -> Pair:
    """The configs in the lock of a shipped recipe."""
    lock = json.loads((ROOT / "recipes" / f"{recipe}.lock").read_bytes())
    target = config_of(lock["target"]["config"], "target")
    draft = config_of(lock["draft"]["config"], "draft") if lock["draft"] else replace(target, layers=2, pattern=())
    checkpoint = Checkpoint(Path(), target, lock["target"]["config"], {}, "")
    values = {"name": recipe, "target.source": "t", "draft.source": "d", "speculation.draft_tokens": [4]}
    return Pair(checkpoint, draft, Chosen(values))


@pytest.mark.parametrize(("recipe", "chip", "ranks"), [
    ("llama-8b-spec", "trn2", 1), ("llama-70b-spec", "trn2", 8), ("llama-70b-spec", "trn1", 16),
    ("qwen3-32b-spec", "trn2", 4), ("qwen3-30b-a3b-spec", "trn2", 4), ("gemma3-12b-spec", "trn2", 2),
    ("gpt-oss-20b-spec", "trn2", 4),
])  # fmt: skip
def test_choose_the_fewest_ranks_that_divide_and_fit(recipe: str, chip: Any, ranks: int) -> None:
    """Half as many ranks do not fit; 2 ranks of gpt-oss-20b did, with 23.2 of 24 GiB on each."""
    pair = pair_of(recipe)
    chosen = choose(pair, chip, None)
    assert chosen.values["parallel.tensor"] == ranks
    assert "GiB" in chosen.reasons["parallel.tensor"]
    plan = make_plan(chosen.recipe, pair.target.config, pair.draft)
    assert plan.memory_limit is not None
    assert plan.memory.total <= FILLED * plan.memory_limit
    half = {"parallel.tensor": ranks // 2} if ranks > 1 else {}
    try:
        fewer = make_plan((chosen | Chosen(half)).recipe, pair.target.config, pair.draft)
    except RecipeError:
        return
    assert not half or fewer.memory.total > FILLED * plan.memory_limit


def test_choose_takes_a_tight_core_where_no_number_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("gpt-oss-20b-spec")
    monkeypatch.setattr("pipeline.proposal.choices.FILLED", 0.01)
    chosen = choose(pair, "trn2", None)
    assert chosen.values["parallel.tensor"] > 4
    assert "programs and buffers come on top" in chosen.reasons["parallel.tensor"]


def test_known_drafts_name_public_texts_or_recipes() -> None:
    for entry in known_drafts():
        assert entry.seen.startswith("https://") or (ROOT / entry.seen.partition(";")[0]).is_file()
        assert "@" not in entry.target + entry.draft
    assert [entry.method for entry in drafts_of("hf://qwen/qwen3-8b@main")] == ["eagle3", "draft_model"]


def test_known_drafts_have_the_pairs_of_the_recipes() -> None:
    """The table feeds the recipes that ship: their public pairs are in it, with their K."""
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load(path)
        if not recipe.target.source.startswith("hf://") or recipe.draft.source is None:
            continue
        drafts = {(entry.draft, entry.draft_tokens) for entry in drafts_of(recipe.target.source)}
        assert (str(recipe.draft.source).partition("@")[0], recipe.speculation.draft_tokens[0]) in drafts


def test_a_line_break_in_a_source_adds_no_line() -> None:
    """A folder may have any name; the header quotes the command."""
    text = commented(Chosen({"name": "x"}), "models/a\nbackend: {name: neuron}")
    assert text.splitlines()[2:] == ["name: x"]
