"""Inputs that ended in an undocumented error, or took minutes or gigabytes, before; each with the old fault."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from itertools import count
from pathlib import Path

import pytest

from fuzz.servers import AnsweringServer, impatient
from fuzz.targets import CORPUS, TARGETS, scratch
from pipeline.errors import CorruptError, HostError, TandemError
from pipeline.stores.hub_api import Hub
from pipeline.stores.ranges import Ranges
from pipeline.stores.s3 import S3Bucket

DEEP = b"[" * 100_000


def changed(name: str, **changes: object) -> bytes:
    """A file of the corpus with other values."""
    return json.dumps(json.loads((CORPUS / name).read_bytes()) | changes).encode()


def head(name: str, **changes: object) -> bytes:
    """A head of the corpus with other shapes; None removes a field of its config."""
    found = json.loads((CORPUS / f"public_head/valid-{name}.json").read_bytes())
    for key, value in changes.items():
        if value is None:
            del found["config"][key]
        else:
            found["tensors"][key] = value
    return json.dumps(found).encode()


def vocabulary_with_one_id_twice() -> bytes:
    """A merged token has the id of another one, and is lost."""
    data = (CORPUS / "tokenizer_parts/valid-vocab").read_bytes()
    vocab = json.loads(data[1:])
    merged = max(vocab, key=len)
    return data[:1] + json.dumps(vocab | {merged: vocab["a"]}).encode()


def safetensors(entry: object) -> bytes:
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header


def gguf(*values: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values)) + b"".join(values)


def gguf_value(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def of_architecture(name: bytes) -> bytes:
    return gguf_value(b"general.architecture", 8, struct.pack("<Q", len(name)) + name)


def zipped(compression: int, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return buffer.getvalue()


def hub_answer(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


HUGE = gguf(gguf_value(b"a", 9, struct.pack("<IQ", 4, 1 << 40)))
TREE = b'[{"type": "file", "path": ["a"], "size": 1, "oid": "x"}]'
FAULTS = {
    "recipe: RecursionError where comments are kept": ("recipe", b"a: " + b"[" * 3000, "nested too deeply"),
    "lock: RecursionError": ("lock", DEEP, "nested too deeply"),
    "config: RecursionError": ("config", DEEP, "nested too deeply"),
    "weight map: RecursionError": ("weight_map", DEEP, "nested too deeply"),
    "safetensors: RecursionError": ("safetensors", struct.pack("<Q", len(DEEP)) + DEEP, "nested too deeply"),
    "safetensors: OverflowError for an infinite offset": (
        "safetensors",
        safetensors({"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}),
        "malformed header entry",
    ),
    "gguf: minutes and gigabytes for a count": ("gguf", HUGE, "beyond the end"),
    "gguf: KeyError without an architecture": ("gguf", gguf(), "unsupported GGUF architecture"),
    "gguf: KeyError without tokens": ("gguf", gguf(of_architecture(b"llama")), "no llama.attention.head_count"),
    "gguf: KeyError for a key that is there twice": ("gguf", gguf(*[of_architecture(b"llama")] * 2), "Duplicate"),
    "tokenizer: TypeError for a vocabulary of null": (
        "tokenizer", changed("tokenizer/valid-words.json", model={"vocab": None}), "malformed tokenizer"),
    "tokenizer: ValueError of the library": (
        "tokenizer", changed("tokenizer/valid-words.json", normalizer={"type": "?"}), "not a usable tokenizer"),
    "tokenizer config: KeyError for a token without content": (
        "tokenizer_config", b'{"bos_token": {"a": 1}}', "another form"),
    "tokenizer config: TypeError in a template": (
        "tokenizer_config", b'{"chat_template": "{{ 1 + \'a\' }}"}', "error in the chat template"),
    "config: gigabytes for a number of layers": (
        "config", changed("config/valid-llama.json", num_hidden_layers=1 << 30), "below 1,000"),
    "tokenizer: a panic of the library": (
        "tokenizer", (CORPUS / "tokenizer/panic.json").read_bytes(), "not a usable tokenizer"),
    "traffic: IndexError for a key that is half a character": (
        "traffic", b'\0{"prompt_tokens": 1, "completion_tokens": 1, "\\ud800": 1}', "not valid Unicode"),
    "weight map: OSError for a long name": (
        "weight_map", json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}).encode(), "weight_map names"),
    "safetensors: IndexError for no dtype": (
        "safetensors", safetensors({"dtype": "", "shape": [1], "data_offsets": [0, 0]}), "missing weight"),
    "dflash: TypeError for a mask token that is a list": (
        "head", changed("head/dflash.json", dflash_config={"mask_token_id": [1], "target_layer_ids": [1, 2]}), "mask"),
    "generation: OverflowError for 400 digits": (
        "generation", b'{"temperature": 1%s}' % (b"0" * 400), "temperature"),
    "head of SpecForge: IndexError for an fc of no dimensions": (
        "public_head", head("specforge", **{"fc.weight": []}), "without dimension 1"),
    "head of speculators: IndexError for a map of no dimensions": (
        "public_head", head("speculators", d2t=[], draft_vocab_size=None), "without dimension 0"),
    "DFlash draft: IndexError for an fc of one dimension": (
        "public_head", head("speculators-dflash", **{"fc.weight": [64]}), "without dimension 1"),
    "init: ValidationError for a target of one position": (
        "init", changed("init/valid-llama.json", max_position_embeddings=1), "expected at least 4"),
    "vLLM's cache: ValueError for a size of 5,000 digits": (
        "vllm_cache", (CORPUS / "vllm_cache/valid.bin").read_bytes().replace(b"size:4", b"size:" + b"9" * 5000),
        "records"),
    "vocabulary: Exception for two tokens of one id": (
        "tokenizer_parts", vocabulary_with_one_id_twice(), "contradicts itself"),
    "io.json: KeyError": ("signature_of_graph", b'{"weights": []}', "damaged signature"),
    "neff: KeyError in the boundary": (
        "neff", (CORPUS / "neff/valid-boundary.zip").read_bytes().replace(b'"kind"', b'"kine"'), "not a graph file"),
    "neff: a compressed member of any size": (
        "neff", zipped(zipfile.ZIP_DEFLATED, graph_neff=bytes(1 << 24), boundary_json=b"{}"), "compressed"),
    "neuron-ls: RecursionError": ("devices", DEEP, "no list of devices"),
    "neuron-ls: ValueError for its cores": (
        "devices", b'[{"nc_count": 2, "memory_size": 1}]\0logical-neuroncore-config: 2x\n', "found logical-neuron"),
    "recipe: TypeError for a misspelt chip": (
        "recipe", b'{"base": "base.yaml", "backend": {"name": "neuron", "target": "trn9"}}', "accepted"),
    "request: RecursionError in a schema": (
        "request", json.dumps({"schema": "[" * 100_000}).encode(), "nested too deeply"),
    "request: RecursionError in biases": (
        "request", json.dumps({"extra": {"logit_bias": "[" * 100_000}}).encode(), "found"),
}  # fmt: skip


HUB_FAULTS = {
    "RecursionError": (hub_answer(DEEP), "not one of a Hub"),
    "KeyError for another object": (hub_answer(b'[{"a": 1}]'), "not one of a Hub"),
    "TypeError for a path that is a list": (hub_answer(TREE), "not one of a Hub"),
    "DecodingError": (hub_answer(b"x", b"Content-Encoding: gzip"), "not one of a Hub"),
}


@pytest.mark.parametrize("fault", HUB_FAULTS)
def test_hub_fault_is_a_documented_error(fault):
    server = AnsweringServer()
    server.answer, said = HUB_FAULTS[fault]
    with impatient(), pytest.raises(TandemError, match=said):
        Hub(server.url, "hf_x").tree("org/name", "main")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_a_documented_error(fault):
    target, data, said = FAULTS[fault]
    with scratch() as folder:
        parse = TARGETS[target].prepare(Path(folder))
        started = time.thread_time()
        with pytest.raises(TandemError, match=said):
            parse(data)
        assert time.thread_time() - started < 1


def test_a_redirect_to_no_address_is_no_range():
    """Http.client raises InvalidURL when a connection is made, before the errors of a read were caught."""
    for url in ("http://127.0.0.\x121:1/x", "http://[", "http://127.0.0.1:99999999/x"):
        assert Ranges().read(url, 0, memoryview(bytearray(4))) is None


def test_a_cell_of_a_log_may_end_in_a_separator():
    """str.strip takes U+001E for a space, int() does not: ValueError."""
    with scratch() as folder:
        TARGETS["traffic"].prepare(Path(folder))(b"\1prompt_tokens,completion_tokens\n10\x1e,5\n")


S3_FAULTS = {
    "ValueError for more bytes than the range": (b"0123456789" * 2, "206 Partial Content", b"0123"),
    "FileNotFoundError for a write": (b"<Error><Code>NoSuchKey</Code></Error>", "404 Not Found", None),
}


@pytest.mark.parametrize("fault", S3_FAULTS)
def test_s3_fault_is_a_documented_error(fault, monkeypatch):
    server, (body, status, read) = AnsweringServer(), S3_FAULTS[fault]
    lines = [f"HTTP/1.1 {status}", "Content-Range: bytes 0-3/20", 'ETag: "e"', f"Content-Length: {len(body)}"]
    lines.append("Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT")
    server.answer = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    for name, value in {
        "ENDPOINT_URL": server.url,
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "REGION": "r",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "1")
    monkeypatch.setattr("pipeline.stores.s3.RETRIES", 0)
    bucket, buffer = S3Bucket("bucket", "prefix"), bytearray(4)
    if read is None:
        with pytest.raises(HostError):
            bucket.create("key", b"data")
        return
    try:
        bucket.read("key", 0, memoryview(buffer))
    except HostError:
        return  # a client that compares the length itself
    assert bytes(buffer) == read


def test_oci_registry_whose_list_never_ends(monkeypatch):
    """A page that names itself as the next one was read for ever, then a thousand times."""
    from pipeline.stores import oci_api
    from pipeline.stores.oci_session import Answer

    registry = oci_api.OciRegistry("127.0.0.1:9")
    again = Answer(200, {"link": '</v2/org/name/tags/list>; rel="next"'}, b'{"tags": ["1.0"]}')
    monkeypatch.setattr(registry.session, "request", lambda *_, **__: again)
    with pytest.raises(CorruptError, match="has no end"):
        registry.tags("org/name")


def test_oci_registry_whose_list_always_has_another_page(monkeypatch):
    from pipeline.stores import oci_api
    from pipeline.stores.oci_session import Answer

    registry, pages = oci_api.OciRegistry("127.0.0.1:9"), count()
    monkeypatch.setattr(
        registry.session, "request",
        lambda *_, **__: Answer(200, {"link": f'</v2/x?last={next(pages)}>; rel="next"'}, b'{"tags": ["1.0"]}'),
    )  # fmt: skip
    with pytest.raises(CorruptError, match="over 1000 pages"):
        registry.tags("org/name")


@pytest.mark.parametrize(
    ("status", "header", "call"),
    [
        (
            202,
            {"location": "//["},
            lambda registry: registry.put_blob("org/name", "sha256:x", 1, lambda: iter((b"x",))),
        ),
        (200, {"link": '<//[x>; rel="next"'}, lambda registry: registry.tags("org/name")),
    ],
)
def test_oci_registry_that_names_a_malformed_address(monkeypatch, status, header, call):
    """ValueError: Invalid IPv6 URL."""
    from pipeline.stores import oci_api
    from pipeline.stores.oci_session import Answer

    registry = oci_api.OciRegistry("127.0.0.1:9")
    monkeypatch.setattr(registry.session, "request", lambda *_, **__: Answer(status, header, b"{}"))
    with pytest.raises(CorruptError, match="malformed address"):
        call(registry)


def test_oci_registry_that_sends_readers_to_a_malformed_address(monkeypatch):
    from pipeline.stores import oci_api

    server = AnsweringServer()
    server.answer = b"HTTP/1.1 307 X\r\nLocation: //[\r\nContent-Length: 0\r\n\r\n"
    registry = oci_api.OciRegistry(server.url.removeprefix("http://"))
    with pytest.raises(CorruptError, match="malformed address"):
        registry.read_blob("org/name", f"sha256:{'ab' * 32}", 0, memoryview(bytearray(4)))


def test_oci_registry_whose_answers_have_other_types(monkeypatch):
    """A number in place of a list of tags, and a size that is none."""
    from pipeline.stores import oci_api
    from pipeline.stores.oci_session import Answer

    registry = oci_api.OciRegistry("127.0.0.1:9")
    monkeypatch.setattr(
        registry.session, "request", lambda *_, **__: Answer(200, {"content-length": "x"}, b'{"tags": 5}')
    )
    assert registry.tags("org/name") == []
    assert registry.has_blob("org/name", "sha256:x") == -1
