"""Calls without settings take those of generation_config.json, as transformers' `generate` does with the folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from pipeline.errors import InputError
from pipeline.runtime.latency import generate_timed
from support.defaults import engine_with

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 3], [40, 41, 42, 43, 44], [7]]


def generated(work: Path, prompt: list[int], **how) -> list[int]:
    """New tokens of transformers for the same folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "target", dtype=torch.float32)
    given = torch.tensor([prompt])
    return model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **how)[
        0, len(prompt) :
    ].tolist()


def tokens(engine, prompts, **how) -> list[list[int]]:
    return [answer.tokens for answer in engine.generate(prompts, **how)]


@pytest.mark.parametrize(
    ("generation", "how"),
    [
        ({"max_new_tokens": 9}, {}),
        ({"max_length": 14}, {}),
        ({"max_length": 14, "max_new_tokens": 7}, {}),
        ({"max_new_tokens": 9}, {"max_new_tokens": 4}),
        ({"do_sample": False, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "max_new_tokens": 9}, {}),
        ({"temperature": 1.5, "top_k": 7, "max_new_tokens": 9}, {}),
        ({"do_sample": True, "top_k": 1, "max_new_tokens": 9}, {}),
        ({"do_sample": True, "temperature": 5.0, "top_p": 0.0, "max_new_tokens": 9}, {}),
        (None, {"max_new_tokens": 9}),
    ],
)
@pytest.mark.parametrize("sampling", [("greedy",), ("greedy", "stochastic")])
def test_answers_are_those_of_transformers(tmp_path, generation, how, sampling):
    """The file was reduced to its end-of-sequence ids, so limits and sampling had to be given again."""
    engine = engine_with(tmp_path, generation, sampling)
    assert tokens(engine, PROMPTS, **how) == [generated(tmp_path, prompt, **how) for prompt in PROMPTS]


@pytest.mark.parametrize("listed", [False, True])
def test_answers_stop_at_the_ids_of_the_file(tmp_path, listed):
    """With the file's ids, or with a list of them."""
    free = engine_with(tmp_path, {"max_new_tokens": 12})
    end = tokens(free, [PROMPTS[0]])[0][4]
    engine = engine_with(tmp_path, {"eos_token_id": [end, 500] if listed else end, "max_new_tokens": 12})
    [answer] = engine.generate([PROMPTS[0]])
    assert answer.tokens == generated(tmp_path, PROMPTS[0])
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) < 12


SAMPLED = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 5},
    {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 0.6},
]
DRAWS = 600


@pytest.mark.parametrize("generation", SAMPLED)
def test_sampled_tokens_have_the_distribution_of_transformers(tmp_path, generation):
    """Requests without a temperature were greedy; a `top_k` of 50 is transformers' default."""
    engine = engine_with(tmp_path, generation | {"max_new_tokens": 1})
    ours = Counter(answer[0] for answer in tokens(engine, [PROMPTS[0]] * DRAWS, seed=3))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float32)
    given = torch.tensor([PROMPTS[0]])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), pad_token_id=0, output_scores=True, return_dict_in_generate=True
    )
    probs = torch.softmax(out.scores[0][0], dim=-1)
    assert set(ours) <= set(probs.nonzero()[:, 0].tolist())
    distance = sum(abs(ours[token] / DRAWS - float(p)) for token, p in enumerate(probs)) / 2
    noise = float((probs * (1 - probs) / DRAWS).sqrt().sum()) / 2
    assert distance < 1.5 * noise + 0.02
    assert len(ours) > 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (0.6, 5, 0.9)), ({"temperature": 0.0}, (0.0, 0, 1.0)), ({"temperature": 1.2}, (1.2, 5, 0.9)),
     ({"top_k": 0}, (0.6, 0, 0.9)), ({"top_p": 1.0}, (0.6, 5, 1.0))],
)  # fmt: skip
def test_settings_of_a_call_come_first(tmp_path, given, expected):
    engine = engine_with(tmp_path, {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9})
    found = engine.choice(**given)
    assert (found.temperature, found.top_k, found.top_p) == expected


def test_artifact_without_stochastic_graphs_is_greedy_and_says_so(tmp_path):
    """The default of such a model cannot be applied; a call that asks for sampling is refused."""
    engine = engine_with(tmp_path, {"do_sample": True, "temperature": 0.6, "max_new_tokens": 5}, ("greedy",))
    assert tokens(engine, PROMPTS) == [generated(tmp_path, prompt, do_sample=False) for prompt in PROMPTS]
    assert engine.defaults.not_applied(engine.manifest.sampling) == (
        "do_sample=true (no stochastic graphs were built)",
    )
    with pytest.raises(InputError, match="stochastic sampling was not built"):
        engine.generate(PROMPTS, temperature=0.6)


def test_prompt_longer_than_max_length_is_refused(tmp_path):
    """As in transformers, with the prompt and the setting named."""
    engine = engine_with(tmp_path, {"max_length": 4})
    with pytest.raises(InputError, match=r"prompt 1: 5 tokens; generation_config\.json has max_length=4"):
        engine.generate(PROMPTS)
    with pytest.raises(ValueError, match="max_length"):
        generated(tmp_path, PROMPTS[1])
    assert len(tokens(engine, PROMPTS, max_new_tokens=3)[1]) == 3


def test_stream_takes_the_settings_of_the_file(tmp_path):
    engine = engine_with(tmp_path, {"do_sample": True, "temperature": 1.5, "max_new_tokens": 6})
    pieces = "".join(engine.stream(PROMPTS[0], seed=4))
    assert pieces == engine.generate([PROMPTS[0]], seed=4)[0].text
    assert pieces == engine.generate([PROMPTS[0]], seed=4, temperature=1.5, top_k=50, max_new_tokens=6)[0].text


def test_measurements_are_greedy_whatever_the_file_says(tmp_path):
    """`bench`, `tune` and the gates compare answers, so these must not be random or end early."""
    engine = engine_with(tmp_path, {"do_sample": True, "temperature": 5.0, "max_new_tokens": 1})
    _, answer = generate_timed(engine, PROMPTS[0], 9, speculate=True)
    assert answer.tokens == generated(tmp_path, PROMPTS[0], do_sample=False, max_new_tokens=9)
