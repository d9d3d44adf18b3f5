"""Sampling: its random numbers, what top-k and top-p keep, and answers that depend on their seed alone."""

import numpy as np
import pytest
import torch

from pipeline.sources.pair import resolve_pair
from pipeline.speculation.noise import gumbel
from pipeline.speculation.sampling import Drawn, Sampling, Vocabulary, lowest_kept, sample
from pipeline.validate.gates import judge
from support.eager import make_engine
from support.pairs import seeds
from support.reports import recipe_of


def uniform(numbers: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.exp(-numbers.double()))


def test_noise_is_that_of_the_gates_own_code():
    """Two implementations of the same function of seed, position and token."""
    for seed, position in ((0, 0), (7, 3), (2**63 + 11, 4000), (2**64 - 1, 131_071)):
        words = torch.tensor([[seed & 0xFFFFFFFF, seed >> 32]]).to(torch.int32)
        found = gumbel(words, torch.tensor([position]), torch.arange(3000))[0]
        assert np.allclose(found.numpy(), judge.gumbel(seed, position, 3000), atol=1e-5)


def test_noise_is_uniform_and_independent():
    """Over ids, positions and seeds, and of neighbours in each; |z| of a correlation below 5."""
    from scipy.stats import chisquare

    positions, ids = torch.arange(40), torch.arange(20_000)
    by_position = gumbel(torch.tensor([[5, 9]], dtype=torch.int32).expand(40, 2), positions, ids)
    by_seed = gumbel(seeds(400, 1), torch.zeros(400, dtype=torch.int32), torch.arange(2000))
    for numbers in (by_position, by_seed):
        counts = torch.histc(uniform(numbers).flatten(), 200, 0, 1)
        assert chisquare(counts.numpy()).pvalue > 1e-6
        for first, second in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
            a, b = (uniform(part).flatten() - 0.5 for part in (first, second))
            assert abs(float((a * b).mean() * 12) * len(a) ** 0.5) < 5


def test_every_bit_of_a_seed_counts():
    words, ids = torch.zeros(1, 2, dtype=torch.int32), torch.arange(5000)
    before = uniform(gumbel(words, torch.tensor([3]), ids))[0] - 0.5
    for bit in range(64):
        other = words.clone()
        other[0, bit // 32] = np.int32(np.uint32(1 << bit % 32).view(np.int32))
        after = uniform(gumbel(other, torch.tensor([3]), ids))[0] - 0.5
        assert abs(float((before * after).mean() * 12)) * 5000**0.5 < 5, bit


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (9, 0.6), (1, 1.0), (500, 0.01)])
def test_kept_tokens_are_those_of_transformers(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(20, 101, generator=torch.Generator().manual_seed(top_k)) * 3
    wanted = scores
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    rows = torch.zeros(20)
    drawn = Drawn(rows, (rows + top_k).int(), rows + top_p, rows, rows, rows)
    lowest = lowest_kept(scores.sort(dim=-1, descending=True).values, drawn)
    assert torch.equal(scores >= lowest, torch.isfinite(wanted))


def drawn_tokens(logits, settings, keep=None, turns=3000):
    rows = torch.ones(turns)
    sampling = Sampling(
        rows * settings.temperature, (rows * settings.top_k).int(), rows * settings.top_p, seeds(turns, 2)
    )
    names = torch.arange(len(logits), dtype=torch.int32)
    logits_BTV = logits.expand(turns, 1, -1)
    return sample(logits_BTV, sampling, torch.full((turns, 1), 4), names, Vocabulary(keep))[:, 0]


@pytest.mark.parametrize("settings", judge.SETTINGS, ids=judge.words)
@pytest.mark.parametrize("keep", [None, 40])
def test_tokens_follow_the_distribution(settings, keep):
    """Against the distribution that the gates compute by their own code; false alarm 1e-6."""
    from scipy.stats import chisquare

    logits = torch.randn(61, generator=torch.Generator().manual_seed(3)) * 2
    tokens = drawn_tokens(logits, settings, keep)
    probs = judge.Judge(keep, 0.0).probabilities(logits, settings)
    counts = torch.bincount(tokens, minlength=61).double()
    assert (counts[probs == 0] == 0).all()
    large = probs * len(tokens) >= 5
    if int(large.sum()) < 2:
        assert counts[probs.argmax()] == len(tokens)
        return
    seen = torch.cat((counts[large], counts[~large].sum()[None]))
    wanted = torch.cat((probs[large], probs[~large].sum()[None])) * len(tokens)
    seen, wanted = (part if wanted[-1] > 1e-9 else part[:-1] for part in (seen, wanted))
    assert chisquare(seen.numpy(), (wanted * (seen.sum() / wanted.sum())).numpy()).pvalue > 1e-6


def test_temperature_zero_is_greedy_with_the_lowest_id():
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    for keep in (None, 3):
        assert set(drawn_tokens(logits, judge.GREEDY, keep, turns=20).tolist()) == {1}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("lookup", [None, 2])
def test_speculation_samples_what_decode_steps_sample(tmp_path, lookup):
    """Token for token: sampled answers are lossless, too, and drafts with the same noise are accepted."""
    recipe = recipe_of("llama", 4, "float32", ("greedy", "stochastic"))
    recipe = recipe.model_copy(update={"speculation": recipe.speculation.model_copy(update={"lookup": lookup})})
    engine = make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))
    prompts = [[5, 9, 3, 7], [8, 1, 2, 30, 8, 1, 2], [4, 4, 60, 2]]
    for choice in (judge.SETTINGS[0], judge.SETTINGS[1], judge.SETTINGS[3]):
        settings = {"temperature": choice.temperature, "top_k": choice.top_k, "top_p": choice.top_p, "seed": 11}
        plain, drafted = (
            engine.generate(prompts, max_new_tokens=20, speculate=how, **settings) for how in (False, True)
        )
        assert [of.tokens for of in drafted] == [of.tokens for of in plain]
        assert sum(of.accepted for of in drafted) > 0
    one = engine.generate([prompts[0]], max_new_tokens=20, **settings)[0]
    assert one.tokens == plain[0].tokens
