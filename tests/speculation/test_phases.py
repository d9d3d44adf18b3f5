"""The four phases, eagerly and in float32: what the design promises of every graph."""

import pytest
import torch

from pipeline.graphs.spec import GraphSpec
from pipeline.models.parallel import Seams
from pipeline.speculation.sampling import greedy
from support.pairs import empty_state, make_pair, seeds

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8], [11, 30]]


def speculate_all(pair, prompts, steps, count, kv=None):
    """Greedy speculation of ragged rows until each has `count` tokens; rows become inactive as they finish."""
    kv = kv or pair.shape.length
    rows = [[*prompt, int(token)] for prompt, token in zip(prompts, pair.prefill(prompts), strict=True)]
    emitted = []
    spec = GraphSpec("speculate", len(rows), steps + 1, kv, steps)
    while True:
        active = [len(row) - len(prompt) < count for row, prompt in zip(rows, prompts, strict=True)]
        if not any(active):
            return [r[len(p) : len(p) + count] for r, p in zip(rows, prompts, strict=True)], emitted
        last, position = [row[-1] for row in rows], [len(row) - 1 for row in rows]
        tokens, counts = pair.step(spec, last_token=last, position=position, active=torch.tensor(active))
        for row, new, size, alive in zip(rows, tokens.tolist(), counts.tolist(), active, strict=True):
            assert new[size:] == [-1] * (steps + 1 - size)
            assert (1 <= size <= steps + 1) if alive else size == 0
            row.extend(new[:size])
            if alive:
                emitted.append(size)


@pytest.mark.parametrize("agreement", ["all", "some", "none"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("rows", [1, 4])
def test_speculate_equals_plain_greedy(agreement, steps, rows):
    pair = make_pair(agreement, rows=rows)
    got, emitted = speculate_all(pair, PROMPTS[:rows], steps, 14)
    assert got == [pair.greedy(prompt, 14) for prompt in PROMPTS[:rows]]
    if agreement == "all":
        assert set(emitted) == {steps + 1}
    if agreement == "none":
        assert set(emitted) == {1}


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_speculate_stops_at_the_last_positions(steps):
    """Fewer drafts count near the end of the cache; all positions but the scratch one are used."""
    pair = make_pair("all", rows=1, length=24)
    count = 24 - 3
    got, emitted = speculate_all(pair, PROMPTS[:1], steps, count)
    assert got == [pair.greedy(PROMPTS[0], count)]
    assert sum(emitted) == count - 1


def test_speculate_crosses_kv_buckets():
    """A smaller bucket attends over part of the same cache, up to its own edge."""
    pair = make_pair("some", rows=2, length=40)
    small, _ = speculate_all(pair, PROMPTS[:2], 4, 8, kv=16)
    pair.state = empty_state(pair.shape)
    large, _ = speculate_all(pair, PROMPTS[:2], 4, 8, kv=40)
    assert small == large == [pair.greedy(prompt, 8) for prompt in PROMPTS[:2]]


def test_decode_equals_plain_greedy():
    pair = make_pair("some")
    last, rows = pair.prefill(PROMPTS).tolist(), [list(p) for p in PROMPTS]
    spec = GraphSpec("decode", 4, 1, 40)
    for _ in range(9):
        for row, token in zip(rows, last, strict=True):
            row.append(token)
        last = pair.step(
            spec, last_token=last, position=[len(r) - 1 for r in rows], active=torch.ones(4, dtype=torch.bool)
        )[0].tolist()
    assert [r[len(p) :] for r, p in zip(rows, PROMPTS, strict=True)] == [pair.greedy(p, 9) for p in PROMPTS]


@pytest.mark.parametrize("phase", ["decode", "speculate", "prefill"])
def test_inactive_rows_change_nothing(phase):
    """Of an inactive row only the scratch position, which holds no token, may differ."""
    pair = make_pair("some")
    pair.prefill(PROMPTS)
    before = {name: tensor.clone() for name, tensor in pair.state.items()}
    active = torch.tensor([False, True, False, False])
    if phase == "prefill":
        spec = GraphSpec("prefill", 4, 4, 4)
        out = pair.step(spec, tokens=torch.ones(4, 4, dtype=torch.int32), lengths=[0, 3, 0, 0], slots=[0, 1, 2, 3])
    else:
        steps = 3 if phase == "speculate" else 0
        spec = GraphSpec(phase, 4, steps + 1, 40, steps)
        out = pair.step(spec, last_token=[1, 2, 3, 4], position=[3, 1, 7, 2], active=active)
    assert (out[0].reshape(4, -1)[~active] == -1).all()
    for name, tensor in pair.state.items():
        kept, was = (tensor, before[name]) if name == "draft/tail" else (tensor[:, :, :-1], before[name][:, :, :-1])
        assert torch.equal(kept[~active], was[~active]), name


@pytest.mark.parametrize("phase", ["decode", "speculate", "propose"])
@pytest.mark.parametrize("kv", [16, 40])
def test_rows_without_a_position_left_are_inactive(phase, kv):
    """The last row is at the end of its bucket, the one before it at the bucket's last position."""
    pair = make_pair("some", length=40)
    pair.prefill(PROMPTS)
    before = {name: tensor.clone() for name, tensor in pair.state.items()}
    steps = 0 if phase == "decode" else 3
    full = min(kv, 39)
    out = pair.step(
        GraphSpec(phase, 4, steps + 1, kv, steps),
        last_token=[1, 2, 3, 4], position=[3, 1, full - 1, full], active=torch.ones(4, dtype=torch.bool),
    )[0].reshape(4, -1)  # fmt: skip
    assert (out[:3, 0] >= 0).all()
    assert (out[3] == -1).all()
    for name, tensor in pair.state.items():
        kept, was = (tensor, before[name]) if name == "draft/tail" else (tensor[:, :, :-1], before[name][:, :, :-1])
        assert torch.equal(kept[3], was[3]), name


def test_draft_cache_has_no_hole_after_full_acceptance():
    """After a fully accepted step and the draft's next pass, the draft's cache equals the one computed from scratch."""
    pair = make_pair("all", rows=1)
    prompt = PROMPTS[2]
    tokens = [*prompt, int(pair.prefill([prompt])[0])]
    spec = GraphSpec("speculate", 1, 5, 40, 4)
    for _ in range(3):
        new, count = pair.step(spec, last_token=tokens[-1:], position=[len(tokens) - 1], active=torch.tensor([True]))
        assert int(count) == 5
        known = len(tokens)
        tokens += new[0].tolist()
    fresh = make_pair("all", rows=1)
    score = GraphSpec("score", 1, known, 40, model="draft")
    fresh.step(score, tokens=[tokens[:known]], position=[0])
    for name, tensor in pair.state.items():
        if name.startswith(("draft/k", "draft/v")):
            error = (tensor[:, :, :known] - fresh.state[name][:, :, :known]).abs().max()
            assert error < 1e-5, f"{name}: {error:.2e}"


def chi_square(seen, probs, total):
    """p-value of Pearson's test with outcomes expected fewer than 5 times in one bin."""
    from scipy.stats import chisquare

    assert (seen[probs == 0] == 0).all()
    large = probs * total >= 5
    seen = torch.cat((seen[large], seen[~large].sum()[None])).double()
    wanted = torch.cat((probs[large], probs[~large].sum()[None])).double() * total
    used = wanted > 1e-9
    return chisquare(seen[used].numpy(), (wanted[used] * (seen[used].sum() / wanted[used].sum())).numpy()).pvalue


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "steps", "agreement"),
    [(1.0, 0, 1.0, 3, "some"), (0.7, 8, 1.0, 1, "none"), (1.5, 0, 0.8, 3, "none"), (1.2, 20, 0.9, 1, "some")],
)
def test_speculate_draws_from_the_target(temperature, top_k, top_p, steps, agreement):
    """First and second token of a step, and the pair of them, against the target's distribution (false alarm 1e-5)."""
    rows, rounds = 400, 5
    pair = make_pair(agreement, rows=rows, length=16)
    prompt = PROMPTS[0]
    pair.step(GraphSpec("score", rows, 3, 16, model="target"), tokens=[prompt] * rows, position=[0] * rows)
    pair.step(GraphSpec("score", rows, 3, 16, model="draft"), tokens=[prompt] * rows, position=[0] * rows)
    spec = GraphSpec("speculate", rows, steps + 1, 16, steps, "stochastic")
    settings = {
        "last_token": [prompt[-1]] * rows, "position": [len(prompt) - 1] * rows,
        "active": torch.ones(rows, dtype=torch.bool), "temperature": torch.full((rows,), temperature),
        "top_k": [top_k] * rows, "top_p": torch.full((rows,), top_p),
    }  # fmt: skip
    tokens, counts = [], []
    for turn in range(rounds):
        out = pair.step(spec, **settings, seed=seeds(rows, turn))
        tokens.append(out[0])
        counts.append(out[1])
    tokens, counts = torch.cat(tokens).long(), torch.cat(counts)

    def target(prefix):
        logits = pair.logits("target", prefix).double()[-1] / temperature
        order = logits.argsort(descending=True)[: top_k or 61]
        probs = torch.softmax(logits[order], 0)
        inside = int((probs.cumsum(0) < top_p).sum()) + 1
        out = torch.zeros(61, dtype=torch.float64)
        out[order[:inside]] = probs[:inside] / probs[:inside].sum()
        return out

    total = rows * rounds
    assert chi_square(torch.bincount(tokens[:, 0], minlength=61), target(prompt), total) > 1e-5
    modal = int(tokens[:, 0].mode().values)
    second = tokens[(tokens[:, 0] == modal) & (counts >= 2), 1]
    if len(second) > 100:
        assert chi_square(torch.bincount(second, minlength=61), target([*prompt, modal]), len(second)) > 1e-5


def test_chi_square_notices_a_wrong_distribution():
    """The test above has power: greedy acceptance of sampled drafts is caught."""
    torch.manual_seed(1)
    probs = torch.softmax(torch.randn(61).double(), 0)
    wrong = torch.softmax(probs.log() * 1.25, 0)
    drawn = torch.bincount(torch.multinomial(wrong, 4000, replacement=True), minlength=61)
    assert chi_square(drawn, probs, 4000) < 1e-5


def test_greedy_breaks_ties_to_the_lowest_id():
    logits = torch.tensor([[[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]]])
    assert greedy(logits, Seams(), None).tolist() == [[1, 0]]
