"""One graph on several ranks over gloo: outputs equal one rank's; a rank that dies is an error, not a hang."""

import json
import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pipeline import runtime
from pipeline.artifact.manifest import PairManifest
from pipeline.backends.inductor import ranks as ranks_module
from pipeline.backends.inductor.ranks import ManyRanks
from pipeline.build import BuildSettings, run
from pipeline.errors import HostError, InputError
from pipeline.recipe import load
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine
from support.pairs import make_pair

RECIPE = """
name: ranked
target: {{source: "pico://{family}?layers=2"}}
draft: {{derive: {{from: target, layers: [0]}}, placement: {placement}}}
speculation: {{draft_tokens: [2], sampling: [{sampling}], lookup: 1}}
shapes: {{batch: [2], prefill: [16], kv: [96]}}
parallel: {{tensor: {tp}}}
validate: {{prompts: prompts.jsonl, max_new_tokens: 10}}
"""
PROMPTS = [[5, 9, 3], [7, 8], [1, 2, 3, 4, 5, 6, 8]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    (folder / "prompts.jsonl").write_text(json.dumps({"id": "0", "class": "chat", "prompt": "a"}) + "\n")
    return folder


HEAD = (
    RECIPE.replace("{family}?layers=2", "llama")
    .replace("derive: {{from: target, layers: [0]}}", 'source: "pico://llama?draft_vocab=128&eagle3=1"')
    .replace("{{draft_tokens", "{{method: eagle3, draft_tokens")
)


def written(base, tp, placement, family="qwen3", sampling="greedy"):
    """The recipe of the same pair on `tp` ranks; of family `eagle3`, a llama with a head."""
    path = base / f"{family}-{tp}-{placement}-{sampling}.yaml"
    recipe = HEAD if family == "eagle3" else RECIPE
    path.write_text(recipe.format(tp=tp, placement=placement, family=family, sampling=sampling))
    return path


def built(base, *pair):
    """An engine of the same pair on so many ranks."""
    path = written(base, *pair)
    out = base / path.stem
    run(BuildSettings(recipe=load(path), base=base, out=out, cache=base / "cache", workers=2, validate=False))
    return runtime.load(out)


def eager(base, *pair):
    """The same pair whole, on one rank, uncompiled: what its ranks have to equal."""
    recipe = load(written(base, *pair))
    alone = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"tensor": 1})})
    return make_engine(alone, resolve_pair(recipe, base=base, cache=base / "cache/sources"))


@pytest.fixture(scope="module")
def alone(base):
    """Greedy tokens on one rank, plain and speculative: equal."""
    engine = eager(base, 1, "replicated")
    answers = [[a.tokens for a in engine.generate(PROMPTS, max_new_tokens=24, speculate=s)] for s in (False, True)]
    assert answers[0] == answers[1]
    return answers[0]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "placement"), [(2, "sharded"), (4, "replicated")])
def test_ranks_give_the_tokens_of_one_rank(base, alone, tp, placement):
    """With more prompts than rows. Six rounds: two ranks used to deadlock between gloo's lock and the interpreter's."""
    engine = built(base, tp, placement)
    try:
        for _ in range(3):
            for speculate in (False, True):
                answers = engine.generate(PROMPTS, max_new_tokens=24, speculate=speculate)
                assert [answer.tokens for answer in answers] == alone
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tp"), [("llama", 8), ("qwen2", 8), ("mistral", 8), ("eagle3", 2)])
def test_families_on_ranks_greedy_and_stochastic(base, family, tp):
    """Eight ranks replicate four KV heads. Draws depend on the uniforms alone, so tokens are equal, too."""
    pair = (tp, "replicated", family, "greedy, stochastic")
    engines = [eager(base, *pair), built(base, *pair)]
    try:
        greedy, drawn = (
            [[a.tokens for a in engine.generate(PROMPTS, max_new_tokens=20, **how)] for engine in engines]
            for how in ({}, {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "seed": 3})
        )
    finally:
        engines[1].close()
    assert greedy[0] == greedy[1]
    assert drawn[0] == drawn[1]
    assert drawn[0] != greedy[0]


@pytest.mark.slow
def test_a_killed_rank_is_an_error(base, alone):
    """Of this call and of those after it, which used to end in `OSError: handle is closed`."""
    engine = built(base, 2, "sharded")
    os.kill(engine.ranks._workers[1].pid, signal.SIGKILL)
    for failure in ("rank [01]", "the rank processes have ended"):
        with pytest.raises(HostError, match=failure):
            engine.generate(PROMPTS, max_new_tokens=24)


def test_an_interrupted_call_leaves_no_answer_for_the_next(tmp_path):
    """The next call used to return what the ranks had answered too late."""
    ranks = without_graphs(tmp_path)
    slow = ranks._workers[1].pid
    os.kill(slow, signal.SIGSTOP)
    with pytest.raises(TimeoutError), limit(seconds=0.2):
        ranks.reset()
    with suppress(ProcessLookupError):  # it was ended
        os.kill(slow, signal.SIGCONT)
    with pytest.raises(HostError, match="the rank processes have ended"):
        ranks.reset()


def test_a_hung_rank_is_an_error_within_its_limit(tmp_path, monkeypatch):
    """The server waited for ever, with a healthy `/health`."""
    monkeypatch.setenv("TANDEM_RANK_TIMEOUT_S", "0.5")
    ranks = without_graphs(tmp_path)
    ranks.reset()
    slow = ranks._workers[1].pid
    os.kill(slow, signal.SIGSTOP)
    with pytest.raises(HostError, match=r"no answer within 0\.5 s") as caught:
        ranks.reset()
    assert caught.value.where == "rank 1"
    with pytest.raises(HostError, match="the rank processes have ended"):
        ranks.reset()


@pytest.mark.parametrize("text", ["0", "-1", "soon"])
def test_a_limit_that_is_no_time_is_an_error(monkeypatch, text):
    monkeypatch.setenv("TANDEM_RANK_TIMEOUT_S", text)
    with pytest.raises(InputError, match="expected seconds"):
        ranks_module._timeout_s()


def test_failing_rank_says_why_without_pythons_words(tmp_path):
    """The message used to be `FileNotFoundError: No such file or directory: ...`, with the exception's name."""
    ranks = without_graphs(tmp_path)
    with pytest.raises(HostError) as caught:
        ranks.run(SimpleNamespace(name="gone"), {})
    assert caught.value.what == f"No such file or directory: {tmp_path / 'graphs/gone/io.json'}"
    assert caught.value.where.startswith("rank ")


def without_graphs(root) -> ManyRanks:
    """Two ranks that have weights, of no use, and zero their state when asked."""
    for name in ("target/rank-0", "target/rank-1", "draft/rank-0", "draft/rank-1"):
        path = root / f"weights/{name}-of-2.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": torch.zeros(1)}, path)
    pair = replace(make_pair().shape, models=replace(make_pair().shape.models, tp=2))
    return ManyRanks(root, PairManifest.model_construct(pair=pair, backend=InductorSettings(), requires={}))


@contextmanager
def limit(seconds):
    """What a caller may set itself: an exception wherever its main thread is then."""

    def ring(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
