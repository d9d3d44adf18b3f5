"""The target of the server's requests: messages, a JSON schema, extra arguments, and options of the server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from fuzz.checkpoints import TOKENIZER, TOKENIZER_CONFIG
from fuzz.documents import each_alone
from pipeline.errors import InputError
from pipeline.runtime.grammar import Grammars
from pipeline.runtime.rules import Rules, RuleState, check_rules
from pipeline.runtime.text import Text
from pipeline.serve.requests import wants_drafts
from pipeline.serve.settings import options, request_defaults

VOCABULARY = 64
NOT_GIVEN = {
    "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None,
    "allowed_token_ids": None, "bad_words_token_ids": None, "min_tokens": 0, "logprobs": None, "extra_args": None,
}  # fmt: skip
"""vLLM's sampling parameters as it hands them over, after its own checks."""


def _rules_of() -> Callable[[Any], Rules]:
    """Import the reader of vLLM's parameters; where vLLM is not installed, with stand-ins for the names it imports."""
    if find_spec("vllm") is not None:
        from pipeline.serve.parameters import rules_of

        return rules_of
    outputs = ModuleType("vllm.v1.outputs")
    vars(outputs).update(LogprobsLists=tuple, LogprobsTensors=tuple)
    names = {"vllm": ModuleType("vllm"), "vllm.v1": ModuleType("vllm.v1"), "vllm.v1.outputs": outputs}
    with patch.dict(sys.modules, names):  # which also forgets the modules that were imported with them
        from pipeline.serve.parameters import rules_of

        return rules_of


def request_target(folder: Path) -> Callable[[bytes], object]:
    """The fields of a request that Tandem reads itself; vLLM checks the types of the others."""
    rules_of = _rules_of()
    for name, source in (("tokenizer.json", TOKENIZER), ("tokenizer_config.json", TOKENIZER_CONFIG)):
        (folder / name).write_bytes(source.read_bytes())
    text = Text(folder)
    grammars = Grammars(text.as_json(), VOCABULARY, [2])

    def rules(extra: dict[str, Any]) -> None:
        found = rules_of(SimpleNamespace(**NOT_GIVEN | {"extra_args": extra}))
        check_rules(found, VOCABULARY, 5)
        RuleState(found, [1, 2], VOCABULARY, [2]).at([1, 2, 3], [4], None)

    def read(data: bytes) -> None:
        try:
            request = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError("not JSON") from error
        request = request if isinstance(request, dict) else {}
        extra = request.get("extra")
        messages = request.get("messages")
        of_object = messages if isinstance(messages, list) and all(isinstance(m, dict) for m in messages) else []
        defaults = request.get("defaults")
        each_alone(
            lambda: text.encode_chat(of_object),
            lambda: grammars.of_schema(str(request.get("schema", "{}"))).masks([3, 4]),
            lambda: rules(extra if isinstance(extra, dict) else {}),
            lambda: wants_drafts(request.get("speculate", True)),
            lambda: options(request.get("options")),
            lambda: request_defaults(defaults if isinstance(defaults, dict) else {}, {}, ["greedy"]),
        )

    return read


def schema_target(folder: Path) -> Callable[[bytes], object]:
    """The JSON schema of a request, and the first tokens of an answer."""
    grammars = Grammars(TOKENIZER.read_text(encoding="utf-8"), VOCABULARY, [2])
    return lambda data: grammars.of_schema(data.decode(errors="replace")).masks([3, 4])
