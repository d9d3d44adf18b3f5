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
        SourceError: as `generation_of`, or transformers cannot read the tokenizer.

    """
    generation = generation_of(target)
    own = end_of_sequence_id(target)
    ids = dict.fromkeys((*token_ids(generation.get(EOS), GENERATION_CONFIG), *(() if own is None else (own,))))
    others = {name: value for name, value in generation.items() if name != EOS}
    eos = tuple(token for token in ids if 0 <= token < target.config.vocab)
    return replace(
        target,
        config=replace(target.config, eos_ids=eos),
        config_json=target.config_json | {EOS: eos[0] if len(eos) == 1 else list(eos) or None},
        generation=others | ({EOS: list(eos)} if eos else {}),
    )


def generation_of(target: Checkpoint) -> dict[str, Any]:
    """Return the checked fields of `generation_config.json`; without that file, the same fields of the config.

    Raises:
        SourceError: a malformed file; names the field.

    """
    where = target.root / GENERATION_CONFIG
    if where.is_file():
        fields = read_json(where, "write a JSON object, or remove the file")
    else:
        where, fields = target.root / "config.json", generation_fields(target.config_json)
        if target.config.eos_ids:  # of the config, or the default of its family
            fields[EOS] = list(target.config.eos_ids)
    generation_defaults(fields, str(where))
    token_ids(fields.get(EOS), str(where))
    return fields
