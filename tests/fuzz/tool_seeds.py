"""Valid inputs of the targets in `fuzz.tools`, and of promotions and schemas, for `fuzz.seeds`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fuzz.releases import KEY as SHA256
from fuzz.seeds import CHAT, LLAMA, as_json
from fuzz.tools import KEY, PARTS
from pipeline.stores.promotions import Promotion, promotion_text
from support import families
from support.paths import ROOT

HEADS = (
    "speculators", "speculators-3.1", "speculators-p-eagle", "speculators-dflash", "specforge", "specforge-dflash",
    "speculators-dspark", "specforge-dspark",
)  # fmt: skip
SCHEMA = {
    "type": "object", "required": ["a", "b"], "additionalProperties": False,
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 10}, "b": {"$ref": "#/$defs/tree"},
        "c": {"anyOf": [{"const": None}, {"enum": ["x", 1]}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    },
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 3}},
}  # fmt: skip
METADATA = {"cache_key": KEY, "version": 0}
COMMAND = b"neuronx-cc compile graph.hlo --framework=XLA --target trn2 --output x.neff --lnc=2 -O1"
OTHERS = {
    "special_tokens_map.json": as_json({"eos_token": "</s>", "additional_special_tokens": ["<x>"]}),
    "added_tokens.json": as_json({"<x>": 400}),
    "chat_template.jinja": CHAT.encode(),
    "chat_template.json": as_json({"chat_template": CHAT}),
}


def of_tools(folder: Path) -> Iterator[tuple[str, bytes]]:
    step = Promotion("s3://dev/small@1.0", "s3://prod", "2026-11-30T10:00:00Z", "alice", "urn:tandem:builder:local")
    yield "promotion/valid.json", promotion_text("small@1.0", SHA256, [step, step])
    yield "schema/valid.json", as_json(SCHEMA)
    yield "init/valid-llama.json", as_json(LLAMA)
    for name in HEADS:
        yield f"public_head/valid-{name}.json", (ROOT / f"tests/public_heads/{name}.json").read_bytes()
    unnamed = ROOT / "tests/public_heads/specforge-p-eagle.json"  # its mask is a reading of the recipe
    yield "public_head/specforge-p-eagle.json", unnamed.read_bytes()
    parts = b"\0".join((as_json(METADATA), b"neff_size:4\n", COMMAND, b'{"kernel": 1}'))
    yield "vllm_cache/valid.bin", parts
    families.write_tokenizer(folder / "merges", "vocab-merges")
    families.write_tokenizer(folder / "model", "sentencepiece")
    for name, part in {"vocab": "vocab.json", "merges": "merges.txt"}.items():
        yield f"tokenizer_parts/valid-{name}", bytes([PARTS.index(part)]) + (folder / "merges" / part).read_bytes()
    model = (folder / "model/tokenizer.model").read_bytes()
    yield "tokenizer_parts/valid-model", bytes([PARTS.index("tokenizer.model")]) + model
    for part, data in OTHERS.items():
        yield f"tokenizer_parts/valid-{part}", bytes([PARTS.index(part)]) + data
