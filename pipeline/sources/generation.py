"""A target's defaults of generation and its end-of-sequence ids, as transformers and vLLM read them.

Imports no torch at import; transformers, imported where only its tokenizer class knows the end-of-sequence token, does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.models.generation import EOS, GENERATION_CONFIG, generation_defaults, generation_fields, token_ids
from pipeline.sources.checkpoint import Checkpoint, read_json
from pipeline.sources.tokenizer import end_of_sequence_id


def with_generation(target: Checkpoint) -> Checkpoint:
    """Return a target with its defaults of generation, and with the ids that end an answer in its config.

    The ids are those of vLLM: the ids of `generation_config.json`, without that file those of `config.json`, and the
    tokenizer's. Ids outside the vocabulary are left out: no answer has them.

    Raises:
        SourceError: a malformed `generation_config.json`; names the field.

    """
    generation, where = _generation(target)
    generation_defaults(generation, where)
    own = end_of_sequence_id(target)
    ids = dict.fromkeys((*token_ids(generation.get(EOS), where), *(() if own is None else (own,))))
    others = {name: value for name, value in generation.items() if name != EOS}
    eos = tuple(token for token in ids if 0 <= token < target.config.vocab)
    return replace(
        target,
        config=replace(target.config, eos_ids=eos),
        config_json=target.config_json | {EOS: eos[0] if len(eos) == 1 else list(eos) or None},
        generation=others | ({EOS: list(eos)} if eos else {}),
    )


def _generation(target: Checkpoint) -> tuple[dict[str, Any], str]:
    """Return the fields that set the defaults, and the path of their file."""
    path = target.root / GENERATION_CONFIG
    if path.is_file():
        return read_json(path, "write a JSON object, or remove the file"), str(path)
    return generation_fields(target.config_json), str(target.root / "config.json")
