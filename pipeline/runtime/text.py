"""Text <-> tokens with the artifact's own tokenizer and chat template. No transformers at run time."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.errors import ArtifactError, InputError


class Text:
    """The tokenizer of a pair and its chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config, special = _read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json")
        self._specials = {
            key: _token(value) for key, value in (special | config).items() if key.endswith("_token") and value
        }
        self._template = _template(folder, config)

    @property
    def has_chat(self) -> bool:
        """Whether the pair has a chat template."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds unless `special` is off.

        Raises:
            InputError: the text has parts of a character, as a command line in another encoding gives them.

        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"character {error.start} is no character", where="prompt", fix="send UTF-8") from error
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def chat(self, prompt: str) -> list[int]:
        """Token ids of one user message in the chat template, up to where the answer starts.

        Raises:
            ArtifactError: as `chat_text`.

        """
        return self.encode(self.chat_text(prompt), special=False)

    def chat_text(self, prompt: str) -> str:
        """The text of one user message in the chat template, up to where the answer starts.

        Raises:
            ArtifactError: the pair has no chat template, or one that refuses.

        """
        from jinja2 import TemplateError

        if self._template is None:
            raise ArtifactError("this pair has no chat template", where="tokenizer", fix="send plain text (--raw)")
        try:
            return str(_environment().from_string(self._template).render(
                messages=[{"role": "user", "content": prompt}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._specials,
            ))  # fmt: skip
        except TemplateError as error:
            what = f"the chat template fails: {error}"
            raise ArtifactError(what, where="tokenizer", fix="send plain text (--raw)") from error

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt: in the chat template if the pair has one, else as plain text.

        Raises:
            ArtifactError: as `chat_text`.

        """
        return self.chat(prompt) if self.has_chat else self.encode(prompt)

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def token(self, token: int) -> str:
        """Text of one token, special ones by name; parts of a character are shown as the replacement character."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template, wherever a checkpoint may keep it; of several, the one named `default`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    found = config.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _environment() -> Any:
    """What templates of the Hub are written for: a sandbox with the helpers that transformers gives them."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said, for training; here its body is all that counts."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's interface

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda layout: datetime.now().astimezone().strftime(layout),
    }
    return environment


class StreamDecoder:
    """Decodes tokens as they arrive; bytes of an incomplete character wait for the rest."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._returned = ""

    def push(self, tokens: list[int]) -> str:
        """Return the text that the new tokens complete."""
        self._tokens.extend(tokens)
        text = self._decode(self._tokens).rstrip("\ufffd")
        new = text[len(self._returned) :]
        self._returned += new
        return new

    def rest(self) -> str:
        """Return what is left at the end."""
        return self._decode(self._tokens)[len(self._returned) :]
