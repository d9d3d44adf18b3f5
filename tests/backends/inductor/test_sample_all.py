"""The compiled sampler against the plain code, whose tokens the gates check: same tokens for any settings."""

import pytest
import torch

from pipeline.backends.inductor.sample_all import sample_all
from pipeline.speculation import sampling
from support.compiled import run_compiled
from support.pairs import seeds

pytestmark = pytest.mark.compile

SETTINGS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 0, 0.9), (1.0, 50, 1.0), (1.3, 12, 0.95), (2.0, 1, 0.1), (0.05, 3, 1.0),
            (5.0, 0, 0.999), (1.0, 10**6, 0.5)]  # fmt: skip


def arguments(rows: int, vocab: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = [SETTINGS[row % len(SETTINGS)] for row in range(rows)]
    temperature, top_k, top_p = (torch.tensor(column) for column in zip(*chosen, strict=True))
    logits = torch.randn(rows, vocab, generator=generator) * 4
    position = torch.arange(rows, dtype=torch.int32)
    names = torch.randperm(vocab, generator=generator).int()
    return [logits, temperature, top_k.int(), top_p, seeds(rows, seed), position, names]


class Sampler(torch.nn.Module):
    """Several calls in one graph."""

    def forward(self, *tensors):
        return tuple(sample_all(*tensors[start : start + 7]) for start in range(0, len(tensors), 7))


def lone_token() -> list[torch.Tensor]:
    """One token in every row, and in the first, greedy row another that ties with it."""
    given = arguments(len(SETTINGS), 61, 1)
    given[0][:] = -torch.inf
    given[0][:, 17] = 3.0
    given[0][0, 40] = 3.0
    return given


def test_compiled_sampler_gives_the_same_tokens(tmp_path):
    cases = [arguments(11 * len(SETTINGS), vocab, seed) for vocab in (61, 5000) for seed in (0, 1)]
    given = [tensor for case in (*cases, lone_token()) for tensor in case]
    *found, lone = run_compiled({"all": (Sampler(), tuple(given))}, tmp_path)["all"]
    for case, tokens in zip(cases, found, strict=True):
        assert tokens.tolist() == sampling.sample_all(case[0], sampling.Drawn(*case[1:])).tolist()
    assert lone.tolist() == [17] * len(SETTINGS)
