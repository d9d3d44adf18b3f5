"""Words of a server about a request's fields."""

from __future__ import annotations

import pytest

from pipeline.serve.settings import sent


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("logprobs", 0, "true with 0 `top_logprobs`, or 0 in completions"),
        ("logprobs", 5, "true with 5 `top_logprobs`, or 5 in completions"),
        ("min_tokens", 3, "3"),
    ],
)
def test_sent_shows_what_a_client_wrote(name, value, shown):
    """A chat with `logprobs: true` was answered `logprobs: found 0`."""
    assert sent(name, value) == shown
