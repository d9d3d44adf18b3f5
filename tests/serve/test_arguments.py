"""Engine arguments without an effect end the start. A parser as vLLM's; `test_vllm.py` has vLLM's own."""

from __future__ import annotations

import argparse

import pytest

from pipeline.errors import InputError
from pipeline.serve.arguments import HELP, SUPPORTED, restrict, without_usage
from pipeline.serve.settings import BLOCK

ENGINE = ("max_num_seqs", "enable_prefix_caching", "enable_chunked_prefill", "block_size", "kv_cache_dtype", "seed",
          "tokenizer", "enforce_eager", "gpu_memory_utilization", "compilation_config")  # fmt: skip


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """Arguments of the frontend and of the engine, with defaults of an artifact."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-num-seqs", type=int)
    for name in ("--enable-prefix-caching", "--enable-chunked-prefill"):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--compilation-config", "-O", type=dict, default={})

    def refuse(error: InputError) -> None:
        raise error

    parser.set_defaults(tokenizer="/a/tokenizer", enforce_eager=True, max_num_seqs=4)
    without_usage(parser, refuse)
    restrict(parser, ENGINE, refuse)
    return parser


@pytest.mark.parametrize(
    "words",
    [["--no-enable-chunked-prefill"], ["--block-size", "32"], ["--kv-cache-dtype", "fp8"],
     ["--seed", "7"], ["--tokenizer", "other"], ["--gpu-memory-utilization=0.5"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_argument_without_effect_is_refused(parser, words):
    """Chunked prefill, the block size and others were silently overridden."""
    with pytest.raises(InputError, match="no effect with an artifact") as caught:
        parser.parse_args(words)
    flag = words[0].partition("=")[0]
    assert (caught.value.where, caught.value.fix) == (flag, f"remove {flag}")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "where", "what", "fix"),
    [
        (["--max-num-seq", "4"], "--max-num-seq", "neither tandem serve nor vLLM has", "did you mean --max-num-seqs?"),
        (["--max-num-seq=4"], "--max-num-seq", "neither tandem serve nor vLLM has", "did you mean --max-num-seqs?"),
        (["--swap-space", "4"], "--swap-space", "neither tandem serve nor vLLM has it", HELP),
        (["--port", "x"], "--port", "invalid int value: 'x'", HELP),
        (["--port"], "--port", "expected one argument", HELP),
    ],
)
def test_a_wrong_argument_is_one_error_without_the_usage(parser, capsys, words, where, what, fix):
    """vLLM printed three screens of usage, and the error after them."""
    with pytest.raises(InputError) as caught:
        parser.parse_args(words)
    assert (caught.value.where, caught.value.fix) == (where, fix)
    assert what in caught.value.what
    assert capsys.readouterr() == ("", "")


def test_the_error_has_both_values(parser):
    with pytest.raises(InputError) as caught:
        parser.parse_args(["--kv-cache-dtype", "fp8"])
    assert caught.value.what == "found fp8; no effect with an artifact, which has auto"
    with pytest.raises(InputError) as caught:
        parser.parse_args(["--no-enable-chunked-prefill"])
    assert caught.value.what == "found False; no effect with an artifact, which has True"


@pytest.mark.parametrize(
    "words",
    [[], ["--port", "1"], ["--max-num-seqs", "2"], ["--enable-chunked-prefill"], ["--block-size", str(BLOCK)],
     ["--kv-cache-dtype", "auto"], ["--seed", "0"], ["--tokenizer", "/a/tokenizer"], ["--enforce-eager"]],
    ids=" ".join,
)  # fmt: skip
def test_what_holds_anyway_is_accepted(parser, words):
    parser.parse_args(words)


def test_supported_arguments_keep_their_values(parser):
    assert parser.parse_args(["--max-num-seqs", "2"]).max_num_seqs == 2
    assert parser.parse_args(["--no-enable-prefix-caching"]).enable_prefix_caching is False
    assert "max_num_seqs" in SUPPORTED
