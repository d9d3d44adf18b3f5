"""Training a head for a tiny target: from nothing to a draft that a recipe names, with kills in between."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.distill.data import read_part
from pipeline.distill.generate import Transcript, Writer
from pipeline.distill.head import layers_of, model_config
from pipeline.distill.run import distill, prepare
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
from support.heads import FLAT, Parts, write_head
from support.tiny_distill import CONTENT, HELD_OUT, request_of

pytestmark = pytest.mark.usefixtures("one_thread", "short_parts")


@pytest.fixture(scope="module")
def figures(work):
    return distill(request_of(work))


def test_head_guesses_and_a_recipe_can_name_it(work, figures):
    assert figures.tokens_per_step["chat"] > 1.3
    assert figures.data.answer_tokens >= 2_500
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


@pytest.mark.slow
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


def pair_of_block(work, name):
    content = CONTENT | {"draft": {"source": name}, "speculation": {"method": "dflash", "draft_tokens": (3, 7)}}
    recipe = Recipe.model_validate(content)
    return recipe, resolve_pair(recipe, base=work, cache=work / "cache" / "sources")


def test_a_dflash_draft_is_written_in_the_form_of_speculators(work, figures):
    """Its reader and that of speculators take it (`tests/drafts`); every field that readers default is there."""
    found = distill(request_of(work, "new-block", method="dflash", layers=(1, 2), steps=2))
    assert found.data == figures.data
    assert (found.settings.depths, found.settings.anchors, len(found.right_given_previous["chat"])) == (7, 64, 7)
    assert found.settings.depth_weight == pytest.approx(0.7788, abs=1e-4)
    assert "A DFlash draft" in (work / "new-block" / "README.md").read_text()
    draft = pair_of_block(work, "new-block")[1][1].config
    head = draft.eagle3
    assert (head.taps, head.block, head.mask_token, head.from_anchor) == ((0, 1, 2), 8, 511, False)
    assert (draft.qk_norm, draft.layers, draft.draft_vocab, draft.shares_embedding) == ("head", 2, 256, True)
    file = load_file(work / "new-block" / "model.safetensors")
    assert (file["t2d"].shape, int(file["t2d"].sum())) == ((512,), 256)
    assert torch.equal(torch.arange(256) + file[D2T], file["t2d"].nonzero()[:, 0])
    with pytest.raises(InputError, match="training a DFlash draft further is unsupported"):
        prepare(request_of(work, "never", method="dflash", start=work / "new-block", draft_vocab=None))


@pytest.mark.slow
def test_a_dflash_draft_learns_from_the_same_data_and_a_recipe_can_name_it(work, figures):
    """Its first token is right twenty times as often as by chance, 1 in 256, and masks after it nearly always."""
    found = distill(request_of(work, "block", method="dflash", layers=(0, 1, 2), steps=250))
    first, second, *_ = found.right_given_previous["chat"]
    assert first > 20 / 256
    assert second > 0.5
    recipe, pair = pair_of_block(work, "block")
    engine = make_engine(recipe, pair)
    prompts = [engine.text.chat(text) for text in HELD_OUT]
    steps = emitted(engine, prompts, 60, draft_tokens=7)
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


@pytest.mark.slow
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


def test_an_eagle3_head_becomes_a_p_eagle_head(work, figures):
    """Its first draft token is the head's until it is trained; then it is written as a P-EAGLE head."""
    request = request_of(work, "wide", method="p_eagle", start=work / "head", steps=2, draft_vocab=None)
    job = prepare(request)
    sequences = job.sequences()
    draft, batch = job.trainer(sequences).draft, make_batch(sequences[:2], "cpu")
    old = job.start.config
    assert (draft.config.layers, draft.config.eagle3.taps, job.start_share) == (2, old.eagle3.taps, 0)
    embedding = {EMBEDDING: read_tensor(source_weights(job.target)[EMBEDDING]).float()}
    own = {name: read_tensor(ref).float() for name, ref in source_weights(job.start).items()}
    first, second = guesses(draft.config, draft.weights | embedding, batch, 2)
    theirs, later = guesses(old, own | embedding, batch, 2)
    assert torch.allclose(first.logits_MV, theirs.logits_MV, atol=1e-5)
    assert not torch.allclose(second.logits_MV, later.logits_MV, atol=1e-1), "a mask is read there"
    found = distill(request)
    assert (found.start, found.start_share, found.layers) == ("head", 0, (2,))
    assert found.settings.depths == 4
    content = CONTENT | {"draft": {"source": "wide"}, "speculation": {"method": "p_eagle", "draft_tokens": (3,)}}
    _, read = resolve_pair(Recipe.model_validate(content), base=work, cache=work / "cache" / "sources")
    assert (read.config.layers, read.config.eagle3.mask_token, read.config.eagle3.taps) == (2, 511, old.eagle3.taps)
    half = prepare(replace(request, start_share=0.5, layers=(0, 1)))
    assert (half.start_share, half.trainer(sequences).draft.config.layers) == (0.5, 3)


def test_a_head_without_layers_of_the_target_does_not_become_a_p_eagle_head(work):
    write_head(work / "output-head", FLAT, Parts(taps=0, hidden_norm=False))
    with pytest.raises(InputError, match="reads no layers of the target") as caught:
        prepare(request_of(work, "never", method="p_eagle", start=work / "output-head", draft_vocab=None))
    assert caught.value.where == "--start"
    further = prepare(request_of(work, "never", start=work / "output-head", draft_vocab=None))
    assert further.start.config.eagle3.reads_output


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


@pytest.mark.slow
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
