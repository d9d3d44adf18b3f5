"""Text <-> tokens with the artifact's own tokenizer and chat template. No transformers at run time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.errors import ArtifactError, CorruptError, InputError, reason
from pipeline.files.limits import AGAIN, parse_json

Chat = Sequence[Mapping[str, Any]]
"""The messages of a conversation, each with its `role` and its `content`."""


class Text:
    """The tokenizer of a pair and its chat template. The tokens depend on the text only.

    Raises:
        CorruptError: files that are not those of a tokenizer.

    """

    def __init__(self, folder: Path) -> None:
        config, special = _read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json")
        self._tokenizer = _tokenizer(folder, config)
        try:
            self._specials = {
                key: _token(value)
                for key, value in (special | config).items()
                if key.endswith("_token") and value and isinstance(value, str | dict)
            }
            self._template = _template(folder, config)
        except (LookupError, TypeError, ValueError) as error:
            what = "a special token or a chat template has another form"
            raise CorruptError(what, where=str(folder / "tokenizer_config.json"), fix=AGAIN) from error

    @property
    def has_chat(self) -> bool:
        """Whether the pair has a chat template."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return token ids, with the special tokens that the tokenizer adds unless `special` is False.

        Raises:
            InputError: the text has a lone surrogate, for example from a command line in another encoding.
            CorruptError: a tokenizer that lacks a token that it needs.

        """
        _check_unicode(text, "prompt")
        with _damage("tokenizer"):
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def chat(self, prompt: str) -> list[int]:
        """Return the token ids of one user message in the chat template, up to the start of the answer.

        Raises:
            ArtifactError: as `chat_text`.

        """
        return self.encode(self.chat_text(prompt), special=False)

    def encode_chat(self, messages: Chat) -> list[int]:
        """Return the token ids of a conversation in the chat template, up to the start of the next answer.

        Raises:
            InputError: a message without `role` or `content`, or with a lone surrogate.
            ArtifactError: as `chat_text`.

        """
        for index, message in enumerate(messages):
            _check_unicode(str(message.get("content", "")), f"message {index}")
            if missing := [key for key in ("role", "content") if key not in message]:
                fix = 'write {"role": "user", "content": "..."}'
                raise InputError(f"the message has no {missing[0]!r}", where=f"message {index}", fix=fix)
        return self.encode(self._render(messages), special=False)

    def chat_text(self, prompt: str) -> str:
        """Return the text of one user message in the chat template, up to the start of the answer.

        Raises:
            ArtifactError: the pair has no chat template, or the template raises an error.
            InputError: as `encode`.

        """
        _check_unicode(prompt, "prompt")
        return self._render([{"role": "user", "content": prompt}])

    def _render(self, messages: Chat) -> str:
        if self._template is None:
            raise ArtifactError("this pair has no chat template", where="tokenizer", fix="send plain text (--raw)")
        try:
            return str(_environment().from_string(self._template).render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._specials,
            ))  # fmt: skip
        except Exception as error:  # the template is a program
            what = f"error in the chat template: {reason(error)}"
            raise ArtifactError(what, where="tokenizer", fix="send plain text (--raw)") from error

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt: in the chat template if the pair has one, else as plain text.

        Raises:
            ArtifactError: as `chat_text`.

        """
        return self.chat(prompt) if self.has_chat else self.encode(prompt)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids without special tokens.

        As in vLLM, and in transformers for byte-pair encodings, `clean_up_tokenization_spaces` does not apply.
        """
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def as_json(self) -> str:
        """Return the tokenizer as the text of a `tokenizer.json`."""
        return str(self._tokenizer.to_str())

    def token(self, token: int) -> str:
        """Return the text of one token, special tokens by name, with the replacement character for incomplete ones."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"not valid Unicode: lone surrogate at index {error.start}"
        raise InputError(what, where=where, fix="send UTF-8") from error


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Raise a CorruptError for every error of the tokenizers library: its own are bare, its panics no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CorruptError(f"not a usable tokenizer: {reason(error)}", where=where, fix=AGAIN) from error


def _tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer without state of single calls, which files of older artifacts and of checkpoints have."""
    with _damage(str(folder / "tokenizer.json")):
        tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))  # not a part of tokenizer.json
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise CorruptError(f"not JSON: {reason(error)}", where=str(path), fix=AGAIN) from error
    if not isinstance(data, dict):
        raise CorruptError("not a JSON object", where=str(path), fix=AGAIN)
    return data


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template from any file that a checkpoint may keep it in; of several, `default`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _environment() -> Any:
    """Return the environment for templates of the Hub: a sandbox with the helpers of transformers."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks text of the assistant, for training; here only its body counts."""

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
    """Decodes tokens as they arrive; bytes of an incomplete character wait until it is complete."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._returned = ""

    def push(self, tokens: list[int]) -> str:
        """Return the text that the new tokens complete."""
        self._tokens.extend(tokens)
        text = self._decode(self._tokens).rstrip("\ufffd")
        completed = text[len(self._returned) :]
        self._returned += completed
        return completed

    def rest(self) -> str:
        """Return the text that is left at the end."""
        return self._decode(self._tokens)[len(self._returned) :]
