"""What a draft is trained from: prompts, answers, transcripts; and what a run refuses before it writes."""

import json
from dataclasses import replace

import pytest

from pipeline.distill.data import PART, Conversation, Prompts, TextProgress, read_part, write_part
from pipeline.distill.prompts import HeldOutFilter
from pipeline.distill.run import distill, prepare
from pipeline.distill.settings import SEEDS
from pipeline.errors import InputError
from pipeline.progress import no_log, no_rate_progress
from pipeline.recipe.schema import Recipe
from support.tiny_distill import ASKED, CONTENT, HELD_OUT, asking, request_of

pytestmark = pytest.mark.usefixtures("one_thread", "short_parts")


def test_a_seed_decides_what_prompts_are_written_and_not_which_given_ones_are_used(work):
    job = prepare(request_of(work))
    given = Prompts(job.text, HeldOutFilter([]), ["one two", "three four", "five"], seed=1)
    assert [prompt.seed - SEEDS for prompt in given.of(job.writer, range(1, PART))] == [1, 2]
    sources = [Prompts(job.text, HeldOutFilter([]), seed=seed) for seed in (0, 0, 1)]
    written = [[prompt.tokens for prompt in source.of(job.writer, range(64))] for source in sources]
    assert written[0] == written[1] != written[2]


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


def test_text_progress_has_the_rate_of_this_run(monkeypatch):
    """A run of an hour showed neither a rate nor the time left. Tokens of earlier runs are not part of the rate."""
    times, reports, lines = iter([110.0, 112.0, 114.0, 140.0]), [], []
    monkeypatch.setattr("pipeline.distill.data.time.monotonic", times.__next__)
    progress = TextProgress(lines.append, lambda *report: reports.append(report), 10_000, 1000, began=100.0)
    progress.start_answers(1000)
    for tokens in (64, 136):
        progress.add(tokens)
    # 10 s for the prompts of 1000 tokens; then 50 tokens per second: 30 s in all
    assert reports == [(1064, 10_000, pytest.approx(1000 / 41.25)), (1200, 10_000, pytest.approx(1000 / 30))]
    progress.end_part(1200)
    assert lines == ["answer tokens written: 1,200; at least 10,000 are needed; 5 per second, about 29 min 20 s left"]


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
        write_part(work / "unused", 0, 4, job.writer, prompts, 9, TextProgress(no_log, no_rate_progress, 9, 0))
    assert "--prompts" in caught.value.fix
    assert not (work / "unused").exists()


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
