"""Text <-> tokens with the artifact's own tokenizer. No transformers at run time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.errors import ArtifactError


class Text:
    """The tokenizer of a pair and its chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            self._config = json.loads((folder / "tokenizer_config.json").read_text())
        template = folder / "chat_template.jinja"
        self._template = template.read_text() if template.is_file() else self._config.get("chat_template")

    @property
    def has_chat(self) -> bool:
        """Whether the pair has a chat template."""
        return isinstance(self._template, str)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds."""
        return list(self._tokenizer.encode(text).ids)

    def chat(self, prompt: str) -> list[int]:
        """Token ids of one user message in the chat template, up to where the answer starts.

        Raises:
            ArtifactError: the pair has no chat template.

        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not isinstance(self._template, str):
            raise ArtifactError("this pair has no chat template", where="tokenizer", fix="send plain text (--raw)")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(self._template).render(
            messages=[{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            bos_token=_token(self._config.get("bos_token")),
            eos_token=_token(self._config.get("eos_token")),
        )
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value or "")
