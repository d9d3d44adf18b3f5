"""Rules of requests over HTTP: the engine's tokens, JSON of a schema, log probabilities (`make test-vllm`)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.vllm_server import RECIPE, Server, built, prompts, running

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]


RULED = {
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "bias": {"vllm_xargs": {"logit_bias": '{"11": 5, "12": -100}'}},
    "allowed": {"allowed_token_ids": [40, 41, 42, 300]},
    "min_p": {"vllm_xargs": {"min_p": 0.2}, "temperature": 1.1, "seed": 4},
    "min_tokens": {"min_tokens": 9, "vllm_xargs": {"logit_bias": '{"2": 100}'}},
    "logprobs": {"logprobs": 3},
    "sampled": {"temperature": 0.9, "top_k": 30, "seed": 8, "presence_penalty": 0.5},
    "nothing": {},
}


def test_rules_are_those_of_the_engine(server: Server, artifact: Path) -> None:
    """Requests of every kind at once, on 4 slots: each gets the tokens and log probabilities of the engine alone."""
    from pipeline import runtime

    asked = [(name, prompt) for prompt in prompts(9)[2:] for name in RULED]
    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda one: server.complete(one[1], max_tokens=14, **RULED[one[0]]), asked))
    engine = runtime.load(artifact)
    for (name, prompt), answer in zip(asked, served, strict=True):
        how = dict(RULED[name])
        sampling = {key: how.pop(key) for key in ("temperature", "top_k", "seed") if key in how}
        extra = dict(how.pop("vllm_xargs", {}))
        asked_bias = json.loads(extra.pop("logit_bias", "{}"))
        how, bias = how | extra, tuple((int(token), float(value)) for token, value in asked_bias.items())
        allowed = how.pop("allowed_token_ids", None)
        rules = runtime.Rules(**how, logit_bias=bias, allowed_token_ids=allowed and tuple(allowed))
        [expected] = engine.generate([prompt], max_new_tokens=14, rules=rules, **{"temperature": 0, **sampling})
        assert answer["token_ids"] == expected.tokens, name
        if name == "logprobs":
            found = [each.logprob for each in expected.logprobs]
            assert answer["logprobs"]["token_logprobs"] == pytest.approx(found, abs=1e-4)
            tops = answer["logprobs"]["top_logprobs"]  # by text: several tokens may have the same
            assert all(1 <= len(each) <= 4 for each in tops)


def test_log_probabilities_of_a_prompt(server: Server, artifact: Path) -> None:
    """`echo` with `logprobs`, as evaluation harnesses score texts: those of a teacher-forced pass, bucket edges too."""
    from pipeline import runtime
    from pipeline.graphs.arguments import GREEDY
    from pipeline.runtime.batch import Row
    from pipeline.runtime.prompt_scores import prompt_logprobs

    engine = runtime.load(artifact)
    for length in (2, 31, 32, 33, 65, 90):
        prompt = [3 + (n * 7) % 90 for n in range(length)]
        answer = server.complete(prompt, max_tokens=1, echo=True, logprobs=2)
        rows = {0: Row(prompt, length, 0, GREEDY)}
        expected = [each.logprob for each in prompt_logprobs(engine.batch, rows, 2)[0]]
        assert answer["logprobs"]["token_logprobs"][0] is None
        assert answer["logprobs"]["token_logprobs"][1:length] == pytest.approx(expected, abs=1e-4)


SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "sizes"],
    "properties": {
        "name": {"enum": ["ab", "abc", "zz"]},
        "sizes": {"type": "array", "maxItems": 2, "items": {"enum": [1, 22]}},
    },
}  # fmt: skip


def chat(server: Server, **how: object) -> dict:
    body = {"model": "served", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60} | how
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]


def test_structured_outputs_are_of_their_schema(server: Server) -> None:
    """Greedy and sampled, beside requests without a grammar; drafts are accepted, and neighbours are not moved."""
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    plain, before = server.complete([5, 9, 3], max_tokens=20)["token_ids"], server.metrics()
    ways: list[dict] = [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 2.0}]
    with ThreadPoolExecutor(6) as pool:
        beside = [pool.submit(lambda: server.complete([5, 9, 3], max_tokens=20)["token_ids"]) for _ in range(6)]
        answers = list(pool.map(lambda at: chat(server, response_format=schema, **ways[at % 3]), range(18)))
    assert [each.result() for each in beside] == [plain] * 6
    for answer in answers:
        found = json.loads(answer["message"]["content"])
        assert found["name"] in ("ab", "abc", "zz")
        assert set(found["sizes"]) <= {1, 22}
    accepted = server.metrics()["num_accepted_tokens"] - before["num_accepted_tokens"]
    assert accepted > 0


def test_a_named_tool_is_called(server: Server) -> None:
    """By vLLM's grammar of the tool's call, to its end or to the limit: random weights end no argument."""
    tool = {"type": "function", "function": {"name": "keep", "parameters": SCHEMA}}
    choice = {"type": "function", "function": {"name": "keep"}}
    answer = chat(server, tools=[tool], tool_choice=choice, temperature=0)["message"]
    started = str(answer.get("content")).startswith('<tool_call>{"name": "keep", "arguments": ')
    assert started or answer["tool_calls"][0]["function"]["name"] == "keep"


def test_an_artifact_without_shaped_graphs_refuses_rules_by_name(artifact: Path, tmp_path: Path) -> None:
    base = artifact.parent  # its graphs are in this cache
    plain = built(base, RECIPE.replace(", shaped", ""), "plain")
    with running(plain, tmp_path / "log") as server:
        for field, value in {"min_p": 0.1, "logprobs": 2, "min_tokens": 2, "logit_bias": {"5": 1.0}}.items():
            body = {"model": "served", "prompt": [5, 9], "max_tokens": 4, "temperature": 1} | {field: value}
            status, answer = server.post("/v1/completions", body)
            assert (status, field in answer["error"]["message"]) == (400, True)
