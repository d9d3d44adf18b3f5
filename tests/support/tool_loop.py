"""An agent's loop with LangChain against an OpenAI server: a required tool call, its result, an answer in JSON.

Run with the Python of `tests/requirements-clients.txt`: tool_loop.py BASE_URL MODEL. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

WEATHER = {"Paris": "rain", "Rome": "sun"}


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return WEATHER[city]


class Advice(BaseModel):
    """What to take along."""

    umbrella: bool
    sky: Literal["rain", "sun"]


def main(base_url: str, model: str) -> dict[str, object]:
    """Ask, call the tool that the model names with its arguments, ask again, and stream a last answer."""
    chat = ChatOpenAI(
        base_url=base_url, model=model, api_key="none", temperature=0, max_completion_tokens=64, max_retries=0
    )
    messages: list = [HumanMessage("What is the weather in Rome? Use the tool.")]
    asked = chat.bind_tools([weather], tool_choice="required", strict=True).invoke(messages)
    messages.append(asked)
    results = [weather.invoke(call) for call in asked.tool_calls]
    messages += [ToolMessage(result.content, tool_call_id=result.tool_call_id) for result in results]
    advice = chat.with_structured_output(Advice, method="json_schema", strict=True).invoke(messages)
    chunks = [chunk.content for chunk in chat.stream(messages)]
    whole = chat.invoke(messages)
    return {
        "calls": [call["args"] for call in asked.tool_calls],
        "results": [result.content for result in results],
        "advice": advice.model_dump(),
        "streamed": "".join(chunks),
        "whole": whole.content,
        "usage": whole.usage_metadata,
    }


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
