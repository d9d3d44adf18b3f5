"""Shaped scores against loops in plain Python, and `propose` with `verify` against `speculate`."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.graphs.arguments import Choice, Draw, StepRow, step_arguments
from pipeline.graphs.signature import SHAPING
from pipeline.graphs.spec import GraphSpec
from pipeline.graphs.verify_arguments import RowRules, VerifyRow, verify_arguments, word_mask
from pipeline.models.parallel import Seams
from pipeline.speculation.shaping import Shaping, Share, allowed_bits, log_probs, shape
from support.pairs import make_pair

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, PROMPTS = 61, [[5, 9, 3], [7, 7], [1, 2, 3, 4, 5, 6, 8], [11, 30]]


def reference(logits, row, drafts, temperature):
    """Scores of one row at the position after `drafts`, a token at a time."""
    answer = [*row["answer"], *drafts]
    scores = []
    for token, logit in enumerate(logits.tolist()):
        score = logit + row["bias"].get(token, 0.0)
        if token in row["prompt"] or token in answer:
            score = score / row["repetition"] if score > 0 else score * row["repetition"]
        score -= row["frequency"] * answer.count(token) + row["presence"] * (token in answer)
        scores.append(score if token in row["allowed"] else -math.inf)
    best = max(scores)
    if row["min_p"] and temperature:
        scores = [s if math.exp((s - best) / temperature) >= row["min_p"] else -math.inf for s in scores]
    return torch.tensor(scores)


ROWS = [
    {"prompt": [], "answer": [], "bias": {}, "allowed": range(VOCAB), "min_p": 0.0, "presence": 0.0, "frequency": 0.0,
     "repetition": 1.0},
    {"prompt": [1, 2, 3], "answer": [4, 4, 5], "bias": {7: 3.0, 8: -100.0}, "allowed": range(VOCAB), "min_p": 0.0,
     "presence": 0.5, "frequency": 0.25, "repetition": 1.3},
    {"prompt": [60], "answer": [31, 32], "bias": {}, "allowed": [0, 31, 32, 33, 60], "min_p": 0.0, "presence": -0.5,
     "frequency": 0.0, "repetition": 0.8},
    {"prompt": [6], "answer": [], "bias": {9: 1.0}, "allowed": range(VOCAB), "min_p": 0.2, "presence": 0.0,
     "frequency": 0.0, "repetition": 1.0},
]  # fmt: skip
TEMPERATURES = [0.0, 0.7, 1.0, 1.5]


def shape_of(row):
    """The row's arguments, as a caller of graphs makes them."""
    bias, counts = torch.zeros(VOCAB), torch.bincount(torch.tensor(row["answer"], dtype=torch.int64), minlength=VOCAB)
    for token, value in row["bias"].items():
        bias[token] = value
    prompted = torch.zeros(VOCAB, dtype=torch.bool)
    prompted[row["prompt"]] = True
    allowed = word_mask(list(row["allowed"]), VOCAB)[None].expand(4, -1)
    settings = row["min_p"], row["presence"], row["frequency"], row["repetition"]
    return RowRules(bias, counts.int(), prompted, allowed, *settings)


def test_shape_equals_a_loop_over_tokens():
    """Each row of the batch has other rules; positions after 0, 1, 2 and 3 drafts are compared."""
    torch.manual_seed(0)
    logits, drafts = torch.randn(4, 4, VOCAB) * 3, torch.randint(0, 8, (4, 3), dtype=torch.int32)
    spec = GraphSpec("verify", 4, 4, 40, 3, "shaped")
    rows = {slot: VerifyRow(0, 9, (), Draw(), shape_of(row)) for slot, row in enumerate(ROWS)}
    given = verify_arguments(spec, rows, VOCAB)
    names = "bias", "counts", "prompted", "allowed", "min_p", "presence_penalty", "frequency_penalty"
    shaping = Shaping(*(given[name] for name in names), given["repetition_penalty"])
    found = shape(logits, shaping, drafts, torch.tensor(TEMPERATURES))
    for slot, (row, temperature) in enumerate(zip(ROWS, TEMPERATURES, strict=True)):
        for t in range(4):
            wanted = reference(logits[slot, t], row, drafts[slot, :t].tolist(), temperature)
            assert torch.equal(found[slot, t].isinf(), wanted.isinf()), (slot, t)
            torch.testing.assert_close(found[slot, t], wanted)
    assert torch.equal(found[0], logits[0])


@pytest.mark.parametrize("vocab", [31, 32, 33, 61, 64])
def test_words_hold_a_bit_for_each_token(vocab):
    for tokens in ([], [0], [vocab - 1], [30], list(range(vocab)), list(range(0, vocab, 3))):
        bits = allowed_bits(word_mask(tokens, vocab)[None, None], vocab)[0, 0]
        assert bits.nonzero()[:, 0].tolist() == tokens


def test_log_probs_are_the_models_own():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, VOCAB) * 4
    chosen = torch.randint(0, VOCAB, (2, 3))
    got, wanted = log_probs(logits, chosen, 5), torch.log_softmax(logits.double(), dim=-1).float()
    torch.testing.assert_close(got.chosen_BT, wanted.gather(-1, chosen[..., None])[..., 0])
    top = wanted.topk(5, dim=-1)
    torch.testing.assert_close(got.top_BTN, top.values)
    assert torch.equal(got.top_ids_BTN.long(), top.indices)
    order = wanted.argsort(dim=-1, descending=True)
    assert torch.equal(got.rank_BT.long() - 1, (order == chosen[..., None]).int().argmax(dim=-1))


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("agreement", ["all", "some", "none"])
def test_propose_and_verify_is_speculate(agreement, temperature):
    """Rows that ask for nothing: the two graphs emit what the fused one emits, and leave the same caches."""
    steps, fused, split = 3, make_pair(agreement), make_pair(agreement)
    last, _ = (pair.prefill(PROMPTS).tolist() for pair in (fused, split))
    position = [len(prompt) for prompt in PROMPTS]
    draws = [Draw(Choice(temperature), seed) for seed in range(4)]
    for _ in range(4):
        rows = {i: StepRow(last[i], position[i], draws[i]) for i in (0, 1, 3)}
        both = GraphSpec("speculate", 4, steps + 1, 40, steps, "stochastic")
        tokens, count = fused.step(both, **step_arguments(both, rows))
        draft = GraphSpec("propose", 4, steps, 40, steps, "stochastic")
        drafts = split.step(draft, **step_arguments(draft, rows))[0]
        assert (drafts[2] == -1).all()
        check = GraphSpec("verify", 4, steps + 1, 40, steps, "shaped")
        verified = {i: VerifyRow(row.last_token, row.position, drafts[i].tolist(), row.draw) for i, row in rows.items()}
        got = split.step(check, **verify_arguments(check, verified, VOCAB))
        assert torch.equal(got[0], tokens)
        assert torch.equal(got[1], count)
        for name, tensor in fused.state.items():
            whole, parts = (each if name == "draft/tail" else each[..., :-1, :] for each in (tensor, split.state[name]))
            torch.testing.assert_close(whole, parts)  # without the scratch position
        for i in rows:
            last[i], position[i] = int(tokens[i, int(count[i]) - 1]), position[i] + int(count[i])


def test_a_step_of_verify_counts_its_own_drafts():
    """With a presence penalty, a token that an accepted draft brought is penalised at the next position of the step."""
    pair = make_pair("all", rows=1)
    prompt = PROMPTS[2]
    penalty = RowRules(presence_penalty=3.0, counts_V=torch.zeros(VOCAB, dtype=torch.int32))
    wanted, tokens = [], list(prompt)
    for _ in range(6):
        logits = pair.logits("target", tokens)[-1]
        logits[wanted] -= 3.0
        wanted.append(int(logits.argmax()))
        tokens.append(wanted[-1])
    pair.prefill([prompt[:-1]])
    spec = GraphSpec("verify", 1, 6, 40, 5, "shaped")
    row = VerifyRow(prompt[-1], len(prompt) - 1, wanted[:5], Draw(), penalty)
    found = pair.step(spec, **verify_arguments(spec, {0: row}, VOCAB))
    assert (int(found[1]), found[0][0].tolist()) == (6, wanted)


class Ranks(Seams):
    """One of several ranks that are threads; a gather waits for all of them."""

    def __init__(self, rank: int, tp: int, parts: list, barrier: threading.Barrier) -> None:
        self.rank, self.tp, self.parts, self.barrier = rank, tp, parts, barrier

    def all_gather(self, x):
        self.parts[self.rank] = x
        self.barrier.wait(timeout=60)
        gathered = torch.cat(self.parts, dim=-1)
        self.barrier.wait(timeout=60)
        return gathered


@pytest.mark.parametrize("tp", [2, 4])
def test_scores_and_log_probs_of_ranks_are_those_of_one(tp):
    """A rank has 32 ids of 61; with four ranks, two have none. It sends its best scores alone."""
    torch.manual_seed(2)
    logits, drafts = torch.randn(4, 4, VOCAB) * 3, torch.randint(0, VOCAB, (4, 3), dtype=torch.int32)
    spec = GraphSpec("verify", 4, 4, 40, 3, "shaped")
    rows = {slot: VerifyRow(0, 9, (), Draw(), shape_of(row)) for slot, row in enumerate(ROWS)}
    given = verify_arguments(spec, rows, VOCAB)
    shaping = Shaping(*(given[name] for name in SHAPING))
    temperatures, chosen = torch.tensor(TEMPERATURES), torch.randint(0, VOCAB, (4, 4))
    padded = torch.nn.functional.pad(logits, (0, 32 * tp - VOCAB), value=-torch.inf)
    parts, barrier = [None] * tp, threading.Barrier(tp)

    def run(rank):
        share = Share(Ranks(rank, tp, parts, barrier), 32, torch.tensor([32 * rank], dtype=torch.int32))
        own = padded[..., 32 * rank : 32 * rank + 32]
        return shape(own, shaping, drafts, temperatures, share), log_probs(own, chosen, 5, share)

    with ThreadPoolExecutor(tp) as pool:
        found = list(pool.map(run, range(tp)))
    scores = torch.cat([of_rank for of_rank, _ in found], dim=-1)
    torch.testing.assert_close(scores[..., :VOCAB], shape(logits, shaping, drafts, temperatures))
    assert scores[..., VOCAB:].isneginf().all()
    for _, of_rank in found:
        for got, wanted in zip(of_rank, log_probs(logits, chosen, 5), strict=True):
            torch.testing.assert_close(got, wanted)
