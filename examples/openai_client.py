"""Send requests to a server that `tandem serve` runs: `python examples/openai_client.py [URL]`.

The server has the OpenAI API: `tandem serve pico-spec` in another terminal, which needs the install profile `serve`.
The client is the package `openai`, which that profile brings.
"""

from __future__ import annotations

import sys

from openai import OpenAI

URL = "http://127.0.0.1:8000/v1"


def main(url: str) -> str:
    """Complete a text, then stream an answer to a chat; return the streamed text."""
    client = OpenAI(base_url=url, api_key="none")  # `tandem serve ... --api-key KEY` requires one
    (model,) = client.models.list().data
    completion = client.completions.create(model=model.id, prompt="The quick brown fox", max_tokens=8, temperature=0)
    print(f"{model.id}: {completion.choices[0].text!r}")

    text = ""
    chunks = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": "Hi"}], max_tokens=8, temperature=0, stream=True
    )
    for chunk in chunks:
        piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


if __name__ == "__main__":
    main(*sys.argv[1:] or [URL])
