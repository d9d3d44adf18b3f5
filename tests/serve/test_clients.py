"""The official `openai` client, synchronous and asynchronous, against a served artifact (`make test-vllm`)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.vllm_server import Server, prompts

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from pipeline.runtime import Engine

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]

MODEL = "served"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["word", "size"],
    "properties": {"word": {"enum": ["ab", "zz"]}, "size": {"enum": [1, 22]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def together(server: Server) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Engine:
    from pipeline import runtime

    return runtime.load(artifact)


def test_a_conversation_grows_turn_by_turn(client: OpenAI, engine: Engine) -> None:
    """Each answer becomes a part of the next prompt, until the caches are nearly full."""
    messages: list[Any] = list(HI)
    for turn in range(4):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, temperature=0)
        (expected,) = engine.generate([messages], max_new_tokens=4)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(engine.text.encode_chat(messages))
        assert answer.usage.completion_tokens == len(expected.tokens)
        messages += [{"role": "assistant", "content": expected.text}, {"role": "user", "content": f"and {turn}"}]


def test_a_stream_is_the_answer_with_its_usage(client: OpenAI, engine: Engine) -> None:
    (expected,) = engine.generate([HI], max_new_tokens=20)
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, max_completion_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [len(expected.tokens)]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected.finish_reason


def test_log_probabilities_of_both_routes(client: OpenAI, engine: Engine) -> None:
    from pipeline.runtime import Rules

    (expected,) = engine.generate([HI], max_new_tokens=6, rules=Rules(logprobs=2))
    wanted = [each.logprob for each in expected.logprobs]
    answer = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    found = answer.choices[0].logprobs.content or []
    assert [each.logprob for each in found] == pytest.approx(wanted, abs=1e-4)
    assert all(len(each.top_logprobs) == 2 for each in found)
    prompt = engine.text.encode_chat(HI)
    completion = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0, logprobs=2)
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.token_logprobs == pytest.approx(wanted, abs=1e-4)


def test_json_of_a_schema_and_a_required_tool(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=60, temperature=0.8, seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}},
    )  # fmt: skip
    found = json.loads(answer.choices[0].message.content or "")
    assert (found["word"] in ("ab", "zz"), found["size"] in (1, 22)) == (True, True)
    tool = {"type": "function", "function": {"name": "keep", "parameters": SCHEMA}}
    called = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=60, temperature=0, tools=[tool], tool_choice="required"
    )
    (call,) = called.choices[0].message.tool_calls or []
    assert call.function.name == "keep"
    json.loads(call.function.arguments)  # of the schema only where the tool is strict, which random weights do not end


def test_several_answers_stops_and_seeds(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    first, again = (client.chat.completions.create(n=3, **asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) > 1
    plain = client.completions.create(model=MODEL, prompt=[5, 9, 3], max_tokens=12, temperature=0).choices[0].text
    stop = plain[3:5]
    cut = client.completions.create(model=MODEL, prompt=[5, 9, 3], max_tokens=12, temperature=0, stop=stop)
    assert cut.choices[0].text == plain[: plain.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_requests_at_once_get_the_answers_that_they_get_alone(together: AsyncOpenAI, engine: Engine) -> None:
    async def ask(prompt: list[int]) -> list[int]:
        answer = await together.completions.create(
            model=MODEL, prompt=prompt, max_tokens=15, temperature=0, extra_body={"return_token_ids": True}
        )
        return list((answer.choices[0].model_extra or {})["token_ids"])

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*(ask(prompt) for prompt in prompts(24)))

    expected = [answer.tokens for answer in engine.generate(prompts(24), max_new_tokens=15)]
    assert asyncio.run(ask_all()) == expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_tokens": 500, "messages": [{"role": "user", "content": "word " * 200}]}, "96"),
        ({"top_logprobs": 21, "logprobs": True}, "logprobs"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"tool_choice": {"type": "function", "function": {"name": "keep"}}}, "tool"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "none"}}}}, ""),
    ],
)
def test_a_request_that_cannot_be_is_an_error_of_the_client(client: OpenAI, change: dict[str, Any], told: str) -> None:
    from openai import BadRequestError

    asked: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 4} | change
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert told in str(caught.value)
