"""Writes the valid inputs of `tests/fuzz/corpus/`, files named `valid*`: run it after a change of a format.

PYTHONPATH=.:tests python -m fuzz.seeds
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.releases import KEY, SIGNED
from fuzz.targets import CORPUS
from pipeline.artifact.manifest import MANIFEST, NxdiBackend, NxdiManifest, dump, read
from pipeline.artifact.pulled import PullRecord
from pipeline.artifact.signing import signature_over
from pipeline.backends.neuron.boundary import Boundary, Place
from pipeline.graphs.signature import Signature, TensorSpec
from pipeline.nxdi.config import _vllm
from pipeline.plan.lock import Lock, LockedSource, to_bytes
from pipeline.plan.plan import make_plan
from pipeline.recipe import load
from pipeline.recipe.schema import Recipe
from pipeline.registry.release import make_bundle
from pipeline.stores.base import Yank
from pipeline.stores.yanks import yank_text
from pipeline.validate.report import schema
from support import small_artifacts as small
from support.signing_keys import key_pair

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": True, "eos_token_id": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
MOE: dict[str, Any] = {
    **LLAMA, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 8,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
MULTIMODAL: dict[str, Any] = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106],
    "text_config": {"model_type": "gemma3_text", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
                    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
                    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True},
}  # fmt: skip
COMPRESSED: dict[str, Any] = {
    **LLAMA, "rope_scaling": None,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*norm"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
    },
}  # fmt: skip
HEAD: dict[str, Any] = {
    **{k: v for k, v in LLAMA.items() if k not in ("eos_token_id", "rope_parameters")}, "rope_theta": 10000.0,
    "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 8, "tie_word_embeddings": False,
    "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
}  # fmt: skip
DFLASH: dict[str, Any] = {
    **{k: v for k, v in LLAMA.items() if k not in ("eos_token_id", "rope_parameters")}, "model_type": "qwen3",
    "architectures": ["DFlashDraftModel"], "block_size": 4, "rope_theta": 10000.0,
    "dflash_config": {"mask_token_id": 15, "target_layer_ids": [1, 2]},
}  # fmt: skip
RECIPE = """\
# Every section of a recipe.
name: small
target: {source: ./target, dtype: bfloat16, revision_note: &note x}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2, 4], sampling: [greedy, stochastic]}
shapes:
  batch: [1, 2]
  prefill: [16]
  kv: [32]
validate:
  max_new_tokens: 8
  gates: {tokens_per_step: 1.0}
backend: {name: inductor}
""".replace(", revision_note: &note x", "")
NEURON = """\
base: base.yaml
backend: &b {name: neuron, target: trn2, lnc: 2}
parallel: {tensor: 2}
"""
PROMPTS = """\
{"id": "a", "class": "chat", "prompt": "Hello", "answer": "Hi"}
{"class": "code", "prompt": "def f(x):\\n    return", "answer": " x", "more": [1, {"a": null}]}
"""
POLICY = """\
rules:
  - releases: "/srv/registry/*"
    builder: "https://github.com/org/*"
    signed_by:
      - key: ../release.pub
      - identity: https://github.com/org/repo/.github/workflows/release.yml@refs/heads/main
  - releases: "s3://bucket/*"
    signed_by: [{identity: me@example.com, issuer: https://issuer}]
""".replace("../", "")
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"
)
DEVICES = [{"neuron_device": 0, "bdf": "00:1e.0", "connected_to": None, "nc_count": 2, "memory_size": 34359738368}]
QUANT_STATE = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64], "nested_blocksize": 256,
    "nested_dtype": "float32", "nested_offset": 0.05,
}  # fmt: skip

HEADER = "instance-type: trn2.48xlarge\nlogical-neuroncore-config: 2\n+--------+\n"
SHA = "0123456789abcdef0123456789abcdef01234567"
TREE = [
    {"type": "file", "path": "manifest.json", "size": 5, "oid": SHA},
    {
        "type": "file",
        "path": "weights",
        "size": 10,
        "oid": SHA,
        "lfs": {"oid": "ab" * 32, "size": 10, "pointerSize": 1},
    },
    {"type": "directory", "path": "graphs", "oid": SHA},
]
REFS = {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": SHA}], "converts": [],
        "tags": [{"name": "1", "ref": "refs/tags/1", "targetCommit": SHA}]}  # fmt: skip
COMMITS = [{"id": SHA, "title": "Release 1", "message": "", "date": "2026-01-01T00:00:00.000Z",
            "authors": [{"user": "a", "avatar": ""}]}]  # fmt: skip
MODEL = {"id": "org/name", "sha": SHA, "private": False, "gated": False, "tags": ["tandem"], "downloads": 0, "likes": 0,
         "siblings": [{"rfilename": "config.json", "size": 3, "blobId": SHA},
                      {"rfilename": "model.safetensors", "size": 10,
                       "lfs": {"size": 10, "sha256": "ab" * 32}}]}  # fmt: skip
LISTING = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix>prefix/blobs</Prefix>
<KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated><Contents><Key>prefix/blobs/a</Key>
<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"e"</ETag><Size>3</Size><StorageClass>STANDARD</StorageClass>
</Contents></ListBucketResult>"""
REQUEST = {
    "messages": [{"role": "user", "content": "a b"}], "speculate": True,
    "schema": '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}',
    "extra": {"min_p": 0.1, "logit_bias": '{"5": -100}'}, "options": {"tandem": {"speculate_up_to": 4}},
    "defaults": {"temperature": 0.5},
}  # fmt: skip


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """Return an answer over HTTP."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def as_json(data: object) -> bytes:
    return json.dumps(data).encode()


def tokenizer() -> bytes:
    """A byte-level tokenizer of a few words."""
    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "Ġ", "Ġa", "ab"]
    return as_json({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": words[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in range(3)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": {word: i for i, word in enumerate(words)},
                  "merges": [["Ġ", "a"], ["a", "b"]]},
    })  # fmt: skip


def tokenizer_config() -> bytes:
    return as_json({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": CHAT,
                    "bos_token": {"content": "<s>", "__type": "AddedToken"},
                    "clean_up_tokenization_spaces": False})  # fmt: skip


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def neff(code: bytes = b"code") -> bytes:
    """A NEFF's header for two logical cores, and its data."""
    header = struct.Struct("<5Q128sI32s16s256sI64sQI468s")
    return header.pack(2, 1024, len(code), 2, 0, b"c", 1, b"", b"", b"n", 1, b"", 0, 2, b"") + code


def random_weights(config: dict[str, Any]) -> bytes:
    """The tensors that a config needs, as safetensors."""
    from safetensors.torch import save

    from support.checkpoints import random_weights as made

    return bytes(save(made(config), {"format": "pt"}))


def head_weights() -> bytes:
    """The tensors of an EAGLE-3 head of these sizes."""
    import torch
    from safetensors.torch import save

    from support import heads

    sizes = {"HIDDEN": 8, "INTERMEDIATE": 8, "HEADS": 2, "KV_HEADS": 1, "HEAD_DIM": 4, "VOCAB": 16, "DRAFT_VOCAB": 8}
    for name, value in sizes.items():
        setattr(heads, name, value)
    found = heads.tensors(heads.Parts(draft_vocab=8))
    return bytes(save({name: t.to(torch.float32) if t.is_floating_point() else t for name, t in found.items()}))


def gguf_file() -> bytes:
    """A llama of one layer in GGUF."""
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_key_length(4)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "c", "d"])
        writer.add_token_types([1] * 4)
        writer.add_eos_token_id(2)
        for name, shape in (("token_embd", (4, 8)), ("blk.0.attn_q", (8, 8)), ("output_norm", (8,))):
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
        rows = gguf.quantize(np.ones((8, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.ffn_up.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def of_documents() -> Iterator[tuple[str, bytes]]:
    yield "recipe/valid-small.yaml", RECIPE.encode()
    yield "recipe/valid-neuron.yaml", NEURON.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.yaml"
        path.write_text(RECIPE)
        recipe = load(path)
    source = LockedSource("./target", "r1", config=LLAMA)
    yield "lock/valid-small.json", to_bytes(Lock(recipe.digest(), source, toolchain={"torch": "2.13.0"}))
    yield "prompts/valid-two.jsonl", PROMPTS.encode()
    yield (
        "traffic/valid-log",
        b'\0{"prompt_tokens": 10, "completion_tokens": 5}\n{"usage": {"prompt_tokens": 7, "output_tokens": 2}}\n',
    )
    yield "traffic/valid-csv", b"\1prompt_tokens,completion_tokens,count\n10,5,3\n"
    yield "traffic/valid-histogram", b'\2{"prompt_tokens": {"10": 3}, "completion_tokens": {"5": 2}}'
    yield "traffic/valid-yaml", b"\3{10: 3, 20: 1}\n"
    yield "policy/valid-key.yaml", POLICY.encode()


def of_releases(folder: Path) -> Iterator[tuple[str, bytes]]:
    os.environ["SOURCE_DATE_EPOCH"] = "1"
    made = small.make_validated(folder / "out", folder / "work")
    document = (made.root / MANIFEST).read_bytes()
    yield "manifest/valid-pair.json", document
    pair = made.manifest
    nxdi = NxdiManifest(
        name=pair.name, version=pair.version, created=pair.created, toolchain={**pair.toolchain, "backend": "nxdi"},
        requires=pair.requires, files=pair.files, recipe_digest=pair.recipe_digest, lock_digest=pair.lock_digest,
        backend=NxdiBackend(target="trn2", lnc=1, flags={}), pair=pair.pair, draft_tokens=pair.draft_tokens[0],
    )  # fmt: skip
    yield "manifest/valid-nxdi.json", dump(nxdi)
    yield "release/valid-pair.json", document
    yield "release/valid-index.json", make_bundle([read(made.root)], "other").data
    yield "alias/valid-moves.txt", b"2\t2026-01-01T00:00:00Z\tme\n1\n2\n1\t2025-01-01T00:00:00Z\n"
    yield "yank/valid.json", yank_text(Yank("bad", "2026-01-01T00:00:00Z", "me"))
    yield "provenance/valid.json", (made.root / "provenance.json").read_bytes()
    private, public = key_pair(folder, "release")
    yield "release.pub", public.read_bytes()
    yield "signature/valid.json", signature_over(SIGNED, "x", private, None, None)
    record = PullRecord(
        reference="s3://b/small@1", version="1", manifest_sha256=hashlib.sha256(SIGNED).hexdigest(), signer=None
    )
    yield "pulled/valid.json", record.dump()
    entry = {"key": KEY, "sha256": hashlib.sha256(b"graph").hexdigest(), "size": 5, "toolchain": {"torch": "1"}}
    yield "shared/valid.json", as_json(entry)
    recipe = Recipe.model_validate_json(json.dumps(small.RECIPE), strict=False)
    settings = {"vllm": _vllm(make_plan(recipe, small.CONFIG, small.CONFIG), 2)}
    yield "vllm_settings/valid.json", as_json(settings)


def report(folder: Path) -> bytes:
    """A report of the gates of an eager engine."""
    from support.reports import SMALL, recipe_of, report_of

    made = report_of(folder, recipe_of("llama", 1, "float32", shapes=SMALL, max_new_tokens=4), prompts=["The quick"])
    return schema.to_bytes(made)


def of_checkpoints() -> Iterator[tuple[str, bytes]]:
    for name, config in {"llama": LLAMA, "moe": MOE, "multimodal": MULTIMODAL, "compressed": COMPRESSED}.items():
        yield f"config/valid-{name}.json", as_json(config)
    yield "head/valid-eagle3.json", as_json(HEAD)
    yield "head/dflash.json", as_json(DFLASH)
    yield "head.safetensors", head_weights()
    yield "generation/valid.json", as_json({"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_k": 20,
                                            "top_p": 0.9, "max_new_tokens": 10, "repetition_penalty": 1.1})  # fmt: skip
    table = {"model.norm.weight": "model-00001-of-00001.safetensors"}
    yield "weight_map/valid.json", as_json({"metadata": {"total_size": 1}, "weight_map": table})
    yield "safetensors/valid-llama.safetensors", random_weights(LLAMA)
    yield "quant_state/valid-nf4.json", as_json(QUANT_STATE)
    yield "gguf/valid-llama.gguf", gguf_file()
    yield "tokenizer/valid-words.json", tokenizer()
    yield "tokenizer_config/valid-chat.json", tokenizer_config()


def of_graphs() -> Iterator[tuple[str, bytes]]:
    tokens, weight = TensorSpec("tokens", (1, 1), "int32"), TensorSpec("target/w", (8, 8), "float32")
    state = TensorSpec("target/k.0", (2, 1, 32, 4), "float32")
    signature = Signature((weight,), (state,), (tokens,), (tokens,))
    yield "signature_of_graph/valid-decode.json", as_json(signature.to_json())
    places = (Place("argument", tokens), Place("weight", weight), Place("state", state))
    boundary = Boundary(places, (tokens, state), {1: 2}).to_json()
    yield "neff/valid-boundary.zip", zipped({"graph.neff": neff(), "boundary.json": boundary})
    yield (
        "pt2/valid.zip",
        zipped({"graph/data/model.so": b"\x7fELF", "graph/version": b"3", "graph/archive_format": b"pt2"}),
    )
    yield "operators/valid.txt", b"Add\nDot_General\nAllReduce\nCustom-Call\nreshape Convert-Element-Type\n"
    yield "devices/valid-trn1.json", as_json(DEVICES) + b"\0" + HEADER.encode()


def of_servers() -> Iterator[tuple[str, bytes]]:
    kind = "Content-Type: application/json"
    bodies: dict[str, object] = {"tree": TREE, "refs": REFS, "commits": COMMITS, "model": MODEL, "models": [MODEL]}
    for name, body in bodies.items():
        yield f"hub/valid-{name}.http", answer(as_json(body), kind)
    yield "hub/gone.http", answer(b"", "X-Error-Code: RepoNotFound", status="404 Not Found")
    yield "hub/moved.http", answer(b"", "Location: http://127.0.0.1:1/x", status="302 Found")
    etag = ('ETag: "e"', "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT")
    yield "s3/valid-listing.http", answer(LISTING.encode(), "Content-Type: application/xml", *etag)
    yield "s3/valid-alias.http", answer(b"1\n", *etag)
    yield "s3/range.http", answer(b"0123456789", "Content-Range: bytes 0-9/10", *etag, status="206 Partial Content")
    error = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    yield "s3/denied.http", answer(error, "Content-Type: application/xml", status="403 Forbidden")
    yield "s3/failed.http", answer(b"", status="503 Slow Down")
    yield "ranges/valid.http", answer(b"0123456789", "Content-Range: bytes 0-9/10", status="206 Partial Content")
    yield "request/valid.json", as_json(REQUEST)


def main() -> None:
    from fuzz.registry_seeds import of_registries  # which imports from here
    from fuzz.tool_seeds import of_tools

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = [*of_documents(), *of_releases(folder), *of_checkpoints(), *of_graphs(), *of_servers()]
        found += [*of_registries(folder), *of_tools(folder)]
        if "--report" in sys.argv:  # takes a while
            found.append(("report/valid.json", report(folder / "report")))
        for path, data in found:
            (CORPUS / path).parent.mkdir(parents=True, exist_ok=True)
            (CORPUS / path).write_bytes(data)
    print(f"{len(found)} files in {CORPUS}")


if __name__ == "__main__":
    main()
