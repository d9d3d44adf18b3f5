"""Training a head for a tiny target: from nothing to a draft that a recipe names, with kills in between."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.distill.data import PART, Conversation, Prompts, read_part, write_part
from pipeline.distill.generate import Transcript, Writer
from pipeline.distill.head import layers_of, model_config
from pipeline.distill.prompts import HeldOutFilter
from pipeline.distill.run import distill, prepare
from pipeline.distill.settings import SEEDS, DistillSettings
from pipeline.distill.train import make_batch
from pipeline.errors import InputError
from pipeline.files.atomic import sha256_file
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve, resolve_pair
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights as source_weights
from pipeline.speculation import model_chains
from pipeline.speculation.chains import guesses
from support.eager import emitted, make_engine

CONTENT = {
    "name": "tiny",
    "target": {"source": "pico://llama", "dtype": "float32"},
    "draft": {"derive": {"from": "target", "layers": (0,)}},
    "speculation": {"draft_tokens": (2,)},
    "shapes": {"batch": (1,), "prefill": (64,), "kv": (128,)},
    "validate": {"prompts": "held-out.jsonl", "max_new_tokens": 10},
}
HELD_OUT = ["The quick brown fox jumps", "def add(first, second):"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def short_parts():
    """Two parts of text where a run of the usual size would have written one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.distill.job.PART", 128)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    base = tmp_path_factory.mktemp("distill")
    lines = [json.dumps({"id": f"p{i}", "class": "chat", "prompt": text}) for i, text in enumerate(HELD_OUT)]
    (base / "held-out.jsonl").write_text("\n".join(lines))
    return base


def request_of(work, out: str = "head", **more) -> DistillSettings:
    settings = {"tokens": 4_000, "steps": 80, "draft_vocab": 256, "cache": work / "cache", **more}
    return DistillSettings(recipe=Recipe.model_validate(CONTENT), base=work, out=work / out, **settings)


@pytest.fixture(scope="module")
def figures(work):
    return distill(request_of(work))


ASKED = ["Say hi", "Tell me about the river that flows through the old town", "Name three birds", "Count to ten"]


def asking(work, name: str, prompts: list[str], **more) -> DistillSettings:
    """Answers to given prompts: seconds of writing."""
    path = work / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    return request_of(work, name, prompts=path, **more)


@pytest.fixture(scope="module")
def asked(work):
    """A request whose text is there: an answer to each of four prompts."""
    request = asking(work, "asked", ASKED, steps=2)
    prepare(request).write_data()
    return request


def test_a_seed_decides_what_prompts_are_written_and_not_which_given_ones_are_used(work):
    job = prepare(request_of(work))
    given = Prompts(job.text, HeldOutFilter([]), ["one two", "three four", "five"], seed=1)
    assert [prompt.seed - SEEDS for prompt in given.of(job.writer, range(1, PART))] == [1, 2]
    sources = [Prompts(job.text, HeldOutFilter([]), seed=seed) for seed in (0, 0, 1)]
    written = [[prompt.tokens for prompt in source.of(job.writer, range(64))] for source in sources]
    assert written[0] == written[1] != written[2]


def test_head_guesses_and_a_recipe_can_name_it(work, figures):
    assert figures.tokens_per_step["chat"] > 1.3
    assert figures.data.answer_tokens >= 4_000
    assert "| chat |" in (work / "head" / "README.md").read_text()
    assert load_file(work / "head" / "model.safetensors")[D2T].dtype == torch.int64, "as other servers read it"
    content = CONTENT | {"draft": {"source": "head"}, "speculation": {"method": "eagle3", "draft_tokens": (2,)}}
    recipe = Recipe.model_validate(content)
    pair = resolve_pair(recipe, base=work, cache=work / "cache" / "sources")
    engine = make_engine(recipe, pair)
    prompts = [engine.text.chat(text) for text in HELD_OUT]
    steps = emitted(engine, prompts, 60)
    assert sum(steps) / len(steps) > 1.2
    assert max(steps) == 3


def test_draft_model_learns_from_the_same_data_and_a_recipe_can_name_it(work, figures):
    found = distill(request_of(work, "layers", method="draft_model", layers=(0, 2)))
    assert found.data == figures.data
    assert found.tokens_per_step["chat"] > 1.3
    assert "A draft model" in (work / "layers" / "README.md").read_text()
    recipe = Recipe.model_validate(CONTENT | {"draft": {"source": "layers"}})
    engine = make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "cache" / "sources"))
    prompts = [engine.text.chat(text) for text in HELD_OUT]
    steps = emitted(engine, prompts, 60)
    assert sum(steps) / len(steps) > 1.2


@pytest.mark.slow
def test_a_p_eagle_head_learns_from_the_same_data_and_a_recipe_can_name_it(work, figures):
    """Its masks learn too: places after the first are right far more often than by chance."""
    found = distill(request_of(work, "parallel", method="p_eagle", layers=(1, 2)))
    assert found.data == figures.data
    assert len(found.right_given_previous["chat"]) == 4
    assert found.tokens_per_step["chat"] > 1.3
    assert "A P-EAGLE head" in (work / "parallel" / "README.md").read_text()
    assert load_file(work / "parallel" / "model.safetensors")["mask_hidden"].shape == (1, 1, 192)
    content = CONTENT | {"draft": {"source": "parallel"}, "speculation": {"method": "p_eagle", "draft_tokens": (3,)}}
    recipe = Recipe.model_validate(content)
    pair = resolve_pair(recipe, base=work, cache=work / "cache" / "sources")
    assert (pair[1].config.eagle3.writer, pair[1].config.eagle3.mask_token, pair[1].config.layers) == ("tandem", 511, 2)
    engine = make_engine(recipe, pair)
    prompts = [engine.text.chat(text) for text in HELD_OUT]
    steps = emitted(engine, prompts, 60)
    assert sum(steps) / len(steps) > 1.1
    assert max(steps) > 2, "a mask was accepted"


def test_training_a_draft_model_reads_as_transformers_does(work, figures):
    """Its chains count what a row of drafted tokens would have had right."""
    target = resolve("pico://llama", base=work, cache=work / "cache" / "sources")
    config = config_of(model_config(target, 256, (0, 2)), "draft")
    weights = layers_of(target, config, (0, 2), torch.arange(256))
    weights[EMBEDDING] = read_tensor(source_weights(target)[EMBEDDING]).float()
    one = read_part(next((work / "cache" / "distill").rglob("part-*.safetensors")))[0]
    batch = make_batch([one], "cpu")
    first, second, third = model_chains.guesses(config, weights, batch, 3)
    assert len(first.began_M) == int(batch.learn_BT.sum())
    assert len(first.began_M) - len(third.began_M) == 2
    assert torch.equal(second.positions_M, second.began_M + 1)
    assert torch.equal(second.logits_MV, first.logits_MV[1:])
    shorter = make_batch([type(one)(one.tokens[:-3], one.prompt, one.taps_TX[:-3], one.last_TH[:-3])], "cpu")
    again = next(model_chains.guesses(config, weights, shorter, 1))
    assert torch.allclose(again.logits_MV, first.logits_MV[:-3], atol=1e-4)


def test_a_draft_is_trained_further(work, figures):
    """In ten steps from nothing a head learns next to nothing: what this one knows is the earlier head's."""
    further = distill(request_of(work, "further", start=work / "head", steps=10, draft_vocab=None))
    assert further.start == "head"
    assert further.tokens_per_step["chat"] > figures.tokens_per_step["chat"] - 0.1
    old, new = (load_file(work / name / "model.safetensors") for name in ("head", "further"))
    assert torch.equal(old[D2T], new[D2T])
    assert not torch.equal(old["fc.weight"], new["fc.weight"])
    for change, where in (
        ({"draft_vocab": 1 << 20}, "--draft-vocab"),
        ({"start": work / "cache"}, str(work / "cache")),
        ({"method": "draft_model"}, "--method"),
        ({"layers": (0,)}, "--layers"),
    ):
        with pytest.raises(InputError) as caught:
            distill(request_of(work, "never", **({"start": work / "head", "steps": 5, "tokens": 1 << 40} | change)))
        assert where in (caught.value.where or ""), "before anything is written"


def test_a_draft_that_is_trained_further_may_get_another_vocabulary(work, figures):
    """It keeps the rows of the tokens that it had; others start as the target's."""
    job = prepare(request_of(work, "other", start=work / "head", draft_vocab=320))
    sequences = job.sequences()
    old, ids = load_file(work / "head" / "model.safetensors"), job.ids(sequences)
    old_ids = (torch.arange(256) + old[D2T]).tolist()
    assert len(ids) == job.config_json["draft_vocab_size"] == 320
    target = read_tensor(source_weights(job.target)[EMBEDDING]).float()
    rows = job.trainer(sequences).draft.weights[HEAD]
    kept = 0
    for row, token in zip(rows, ids.tolist(), strict=True):
        known = token in old_ids
        kept += known
        assert torch.equal(row, old[HEAD][old_ids.index(token)].float() if known else target[token])
    assert kept > 128


class Killed(Exception):
    pass


def killed_at(moment: str):
    """A log that ends a run when it says so."""

    def log(line: str) -> None:
        if line.startswith(moment):
            raise Killed

    return log


@pytest.mark.slow
def test_writing_that_was_killed_goes_on(work, figures):
    """Parts are not written again, and the text is that of an undisturbed run."""
    cache = work / "killed-writing"
    with pytest.raises(Killed):
        distill(request_of(work, "writing", cache=cache, log=killed_at("part 1")))
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("part-*.safetensors")}
    prepare(request_of(work, "writing", cache=cache)).write_data()
    assert times
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    texts = [prepare(request_of(work, "writing", cache=of)).folder / "data" for of in (cache, work / "cache")]
    resumed, undisturbed = ({path.name: sha256_file(path) for path in text.iterdir()} for text in texts)
    assert resumed == undisturbed


def test_training_that_was_killed_goes_on(work, figures):
    """It starts from the last state, and the same seed gives the same head."""
    cache, lines = work / "killed-training", []
    own = prepare(request_of(work)).folder / "data"  # the text of the undisturbed run serves as well
    shutil.copytree(own, prepare(request_of(work, "trained", cache=cache)).folder / "data")
    with pytest.raises(Killed):
        distill(request_of(work, "trained", cache=cache, log=killed_at("step 50")))
    distill(request_of(work, "trained", cache=cache, log=lines.append))
    assert "resuming at step 50" in lines
    assert f"training on {figures.data.sequences} sequences, {figures.data.answer_tokens} answer tokens" in lines
    assert sha256_file(work / "trained" / "model.safetensors") == sha256_file(work / "head" / "model.safetensors")


def test_training_drafts_as_the_graphs_do(work, figures):
    """The head's chain of guesses in training equals its proposals in the speculate graph."""
    content = CONTENT | {"draft": {"source": "head"}, "speculation": {"method": "eagle3", "draft_tokens": (3,)}}
    recipe = Recipe.model_validate(content)
    target, draft = resolve_pair(recipe, base=work, cache=work / "cache" / "sources")
    engine = make_engine(recipe, (target, draft))
    prompt = engine.text.chat(HELD_OUT[0])
    answer = engine.generate([prompt], max_new_tokens=40)[0]
    writer = Writer(target, "float32", 1, 128, (0, 1, 2))
    written = next(writer.read([Transcript(prompt, answer.tokens)]))
    part = next((work / "cache" / "distill").rglob("part-*.safetensors"))
    one = read_part(part)[0]
    sequence = type(one)(torch.tensor(written.tokens, dtype=torch.int32), len(prompt), written.taps_TX, written.last_TH)
    batch = make_batch([sequence], "cpu")
    weights = {n.removeprefix("draft/"): t for n, t in engine.ranks.tensors.items() if n.startswith("draft/")}
    weights[EMBEDDING] = engine.ranks.tensors[f"target/{EMBEDDING}"]
    ids = torch.arange(256) + weights[D2T].long()
    right = torch.ones(batch.learn_BT.shape[1], dtype=torch.bool)
    took = torch.zeros(batch.learn_BT.shape[1], dtype=torch.long)
    for guess in guesses(draft.config, weights, batch, 3):
        now = torch.zeros_like(right)
        best = ids[guess.logits_MV.argmax(-1)]
        now[guess.began_M] = right[guess.began_M] & (best == batch.tokens_BT1[guess.rows_M, guess.positions_M + 1])
        took += now
        right = now
    at = len(prompt)
    for size in answer.emitted_per_step[:-1]:
        assert int(took[at - 1]) == size - 1, at
        at += size


def test_prompts_that_gates_came_to_ask_are_not_learned_from(work, asked):
    """A run's own text was once read unfiltered, and with its chat template around it a short prompt never matched."""
    assert len(prepare(asked).sequences()) == 4
    lines = [{"id": "a", "class": "chat", "prompt": "say hi!"}, {"id": "b", "class": "chat", "prompt": ASKED[1][8:]}]
    (work / "later.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = Recipe.model_validate(CONTENT | {"validate": {"prompts": "later.jsonl"}})
    job = prepare(replace(asked, recipe=recipe))
    assert job.folder == prepare(asked).folder
    kept = [job.text.decode(s.tokens[: s.prompt].tolist()) for s in job.sequences()]
    assert [any(words in prompt for prompt in kept) for words in ASKED] == [False, False, True, True]


def test_training_goes_on_with_the_same_text_and_vocabulary_alone(work, asked):
    """Other text of as many sequences was once learned by a draft whose LM head had rows of other tokens."""
    job = prepare(asked)
    *some, last = job.sequences()
    job.trainer(some).train(some, [])
    assert job.trainer(some).step == 2
    assert job.trainer([*some[1:], last]).step == 0
    assert job.trainer(some[::-1]).step == 0
    job.vocab = 320
    assert job.trainer(some).step == 0


def test_an_answer_that_is_shorter_than_a_chain_is_counted(work, asked):
    """A target may end its answer to a held-out prompt at once."""
    job = prepare(asked)
    sequences = job.sequences()
    one = sequences[0]
    short = Conversation(one.tokens[:3], 2, one.taps_TX[:2], one.last_TH[:2])
    assert job.trainer(sequences).accuracy([short]).reached == [1, 0, 0]


def test_part_without_a_prompt_of_use_is_empty_and_no_text_at_all_is_refused(work, monkeypatch):
    monkeypatch.setattr("pipeline.distill.job.PART", 2)
    job = prepare(asking(work, "some", [HELD_OUT[0], "word " * 400, *ASKED[:2]]))
    job.write_data()
    assert [len(read_part(path)) for path in sorted(job.folder.rglob("part-*.safetensors"))] == [0, 2]
    assert len(job.sequences()) == 2
    with pytest.raises(InputError, match="no usable sequences") as caught:
        distill(asking(work, "none", HELD_OUT))
    assert "prompts" in caught.value.fix


def test_target_that_writes_no_prompt_of_use_is_refused(work):
    """Parts would be written for ever."""
    job = prepare(request_of(work))
    prompts = Prompts(job.text, lambda prompt: False)
    with pytest.raises(InputError, match="none of the 4 prompts that the target wrote is usable") as caught:
        write_part(work / "unused", 0, 4, job.writer, prompts, 9, lambda line: None)
    assert "--prompts" in caught.value.fix
    assert not (work / "unused").exists()


def test_a_draft_in_files_of_any_name_is_trained_further(work, figures, asked):
    sequences = prepare(asked).sequences()
    whole = load_file(work / "head" / "model.safetensors")
    for name in ("renamed", "sharded"):
        shutil.copytree(work / "head", work / name)
        (work / name / "model.safetensors").unlink()
    save_file(whole, work / "renamed" / "head.safetensors")
    places = {weight: f"model-{number % 2}.safetensors" for number, weight in enumerate(whole)}
    for file in set(places.values()):
        save_file({w: tensor for w, tensor in whole.items() if places[w] == file}, work / "sharded" / file)
    (work / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for name in ("renamed", "sharded"):
        trainer = prepare(replace(asked, start=work / name, draft_vocab=None)).trainer(sequences)
        assert torch.equal(trainer.draft.weights[HEAD], whole[HEAD].float())


def test_out_that_is_something_else_is_refused(work):
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="output directory was not created by `tandem distill`"):
        distill(request_of(work, "mine"))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"draft_vocab": 5000}, "--draft-vocab"),
        ({"seed": 1 << 32}, "--seed"),
        ({"seed": -1}, "--seed"),
        ({"device": "cuda:77"}, "--device"),
        ({"layers": (0,)}, "--layers"),
        ({"method": "draft_model", "layers": (0, 99)}, "--layers"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(work, change, where):
    with pytest.raises(InputError) as caught:
        distill(request_of(work, "never", **change))
    assert caught.value.where == where
    assert not (work / "never").exists()


def test_text_of_an_earlier_run_is_learned_from_and_only_the_targets_own(work, figures):
    folder = prepare(request_of(work)).folder / "data"
    job = prepare(request_of(work, "more", seed=3, text=(folder, folder)))
    job.write_data()  # what is there is enough
    assert not (job.folder / "data").exists()
    assert job.counts == figures.data
    assert [s.tokens.tolist() for s in job.sequences()] == [
        s.tokens.tolist() for s in prepare(request_of(work)).sequences()
    ]
    other = work / "another-target"
    other.mkdir()
    part = load_file(folder / "part-00000.safetensors")
    with safe_open(folder / "part-00000.safetensors", "pt") as file:
        facts = file.metadata()
    save_file(part | {"last": -part["last"]}, other / "part-00000.safetensors", facts)
    with pytest.raises(InputError, match="hidden states"):
        prepare(request_of(work, "more", text=(other,))).write_data()
    (other / "part-00000.safetensors").write_bytes((folder / "part-00000.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged"):
        prepare(request_of(work, "more", text=(other,))).write_data()
    save_file({HEAD: torch.zeros(2, 2)}, other / "part-00000.safetensors")
    with pytest.raises(InputError, match="not a part of training data"):
        prepare(request_of(work, "more", text=(other,))).write_data()
    (other / "part-00000.safetensors").unlink()
    with pytest.raises(InputError, match="no training data in this folder"):
        prepare(request_of(work, "more", text=(other,))).write_data()


def test_transcripts_and_prompts_of_ones_own(work):
    (work / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Tell me about {i}"}) for i in range(20)))
    talks = [
        {"prompt": f"What is {i}?", "answer": "It is the number that follows the one before it."} for i in range(9)
    ]
    talks.append({"prompt": HELD_OUT[0], "answer": "over the lazy dog"})
    (work / "talks.jsonl").write_text("\n".join(json.dumps(talk) for talk in talks))
    figures = distill(
        request_of(work, "own", tokens=300, steps=5, prompts=work / "prompts.jsonl", transcripts=work / "talks.jsonl")
    )
    assert figures.data.sequences == 9 + 20
    (work / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no lines in the file"):
        distill(request_of(work, "empty", prompts=work / "empty.jsonl"))
    (work / "bad.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}')
    with pytest.raises(InputError, match=r"bad\.jsonl:2"):
        distill(request_of(work, "bad", prompts=work / "bad.jsonl"))
