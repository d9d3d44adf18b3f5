"""Files of prompts and transcripts for training."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.distill.prompts import HeldOutFilter, read_prompts, read_transcripts
from pipeline.errors import InputError


def test_prompts_and_transcripts_are_read(tmp_path: Path) -> None:
    """U+2028 inside a prompt ended its line, and a blank line was an error."""
    data = '\ufeff{"prompt": "a\u2028b", "answer": "c", "source": 1}\r\n\r\n{"prompt": "d", "answer": ""}'
    (tmp_path / "f").write_text(data, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "f") == ["a\u2028b", "d"]
    assert read_transcripts(tmp_path / "f") == [("a\u2028b", "c"), ("d", "")]


@pytest.mark.parametrize("answer", ["null", "5", '["x"]'])
def test_a_field_of_another_type_is_refused(answer: str, tmp_path: Path) -> None:
    """`null` was trained on as the text `None`, and a list as its Python notation."""
    (tmp_path / "f").write_text(f'{{"prompt": "a", "answer": {answer}}}', encoding="utf-8")
    with pytest.raises(InputError, match="`answer`: found") as caught:
        read_transcripts(tmp_path / "f")
    assert caught.value.where == f"{tmp_path / 'f'}:1:27"
    assert caught.value.fix == 'write one JSON object per line, with "prompt" and "answer"'


def test_held_out_prompts_are_kept_apart() -> None:
    held_out_filter = HeldOutFilter(["Write a function that returns the n-th Fibonacci number iteratively, please."])
    assert not held_out_filter("Hello! write a function that returns the n th fibonacci number, recursively")
    assert held_out_filter("Write a function that returns the largest prime")
    assert not HeldOutFilter(["Say hi"])("say HI")
