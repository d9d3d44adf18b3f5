"""A real vLLM serves an artifact over loopback: its answers, its refusals, its metrics (`make test-vllm`)."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import signal
import socket
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

from support.paths import ROOT
from support.vllm_server import RECIPE, START_SECONDS, Server, built, prompts, running

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]


def test_answers_are_those_of_the_engine(server: Server, artifact: Path) -> None:
    """64 prompts, 8 at once on 4 slots, answers of different lengths: requests join and leave all the time."""
    from pipeline import runtime

    before = server.metrics()
    asked = [(prompt, 5 + 3 * (i % 14)) for i, prompt in enumerate(prompts(64))]
    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda one: server.complete(one[0], max_tokens=one[1]), asked))
    engine = runtime.load(artifact)
    steps = accepted = 0
    for (prompt, most), answer in zip(asked, served, strict=True):
        [expected] = engine.generate([prompt], max_new_tokens=most)
        assert answer["token_ids"] == expected.tokens
        assert answer["finish_reason"] == expected.finish_reason
        steps, accepted = steps + expected.steps, accepted + expected.accepted
    counted = {name: value - before.get(name, 0) for name, value in server.metrics().items()}
    assert counted["num_draft_tokens"] == 2 * counted["num_drafts"]
    assert counted["num_accepted_tokens"] == sum(counted[f"num_accepted_tokens_per_pos{k}"] for k in range(2))
    assert 0 < counted["num_accepted_tokens"] <= accepted
    # A last step that has room for one token fewer than the engine's is all that may differ.
    assert abs(counted["num_drafts"] - steps) <= 64
    assert server.process.poll() is None


def test_the_example_of_an_openai_client(server: Server, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`examples/openai_client.py`: its streamed chat is what the engine answers."""
    from pipeline import runtime

    example = runpy.run_path(str(ROOT / "examples/openai_client.py"))
    text = example["main"](f"http://127.0.0.1:{server.port}/v1")
    with runtime.load(artifact) as engine:
        [expected] = engine.generate([[{"role": "user", "content": "Hi"}]], max_new_tokens=8)
    assert text == expected.text
    assert capsys.readouterr().out.startswith("served: ")


def test_an_artifact_of_two_ranks_is_served(tmp_path: Path) -> None:
    """The ranks are processes of the engine's own process; killed with it, and right."""
    from pipeline import runtime

    artifact = built(tmp_path, RECIPE.replace(", shaped", "").replace("shapes:", "parallel: {tensor: 2}\nshapes:"))
    engine = runtime.load(artifact)
    expected = [engine.generate([prompt], max_new_tokens=10)[0].tokens for prompt in prompts(12)]
    engine.close()
    with running(artifact, tmp_path / "log") as server, ThreadPoolExecutor(4) as pool:
        served = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=10)["token_ids"], prompts(12)))
    assert served == expected


def test_the_longest_answer_fills_the_cache(server: Server, artifact: Path) -> None:
    from pipeline import runtime

    answer = server.complete(prompts(30)[29], max_tokens=66, ignore_eos=True)
    assert len(answer["token_ids"]) == 66
    cut = server.complete([5] * 30, max_tokens=90, ignore_eos=True)  # vLLM cuts the limit to the model's
    assert (len(cut["token_ids"]), cut["finish_reason"]) == (66, "length")
    [expected] = runtime.load(artifact).generate([prompts(30)[29]], max_new_tokens=66)
    assert answer["token_ids"][: len(expected.tokens)] == expected.tokens


def test_prompts_longer_than_the_largest_bucket_are_served(server: Server, artifact: Path) -> None:
    from pipeline import runtime

    long = [[3 + n % 90 for n in range(at, at + length)] for at, length in ((0, 33), (7, 60), (11, 94))]
    with ThreadPoolExecutor(4) as pool:
        beside = pool.submit(lambda: server.complete([5, 9], max_tokens=60))
        served = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=8)["token_ids"], long))
    engine = runtime.load(artifact)
    assert served == [engine.generate([prompt], max_new_tokens=8)[0].tokens for prompt in long]
    assert beside.result()["token_ids"] == engine.generate([[5, 9]], max_new_tokens=60)[0].tokens


def test_shared_prefixes_change_no_token_and_are_counted(server: Server, artifact: Path) -> None:
    """A chat that grows, and prompts with one beginning at the same time; a tenant with another salt shares nothing."""
    from pipeline import runtime

    engine, chat = runtime.load(artifact, share_prefixes=False), [3 + n for n in range(40)]

    def hits() -> float:
        return server.metrics("prefix_cache")["hits"]

    def asked(prompt: list[int], **how: object) -> list[int]:
        tokens = server.complete(prompt, max_tokens=5, **how)["token_ids"]
        [expected] = engine.generate([prompt], max_new_tokens=5)
        assert tokens == expected.tokens
        return tokens

    before = hits()
    for turn in range(3):
        chat += [*asked(chat), 50 + turn, 60]
    assert hits() - before >= 32 + 32
    together = [[*chat[:35], n, n + 1] for n in range(70, 80)]
    with ThreadPoolExecutor(4) as pool:
        served = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=5)["token_ids"], together))
    assert served == [answer.tokens for answer in engine.generate(together, max_new_tokens=5)]
    before = hits()
    asked(chat, cache_salt="another tenant")
    assert hits() == before
    asked(chat, cache_salt="another tenant")
    assert hits() > before


def test_sampled_tokens_follow_the_target(server: Server, artifact: Path) -> None:
    """The second token after one prompt, over seeds, beside the engine's own draws: one distribution."""
    from scipy.stats import chi2_contingency

    from pipeline import runtime

    how = {"temperature": 0.8, "top_k": 8, "top_p": 0.95}
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda seed: server.complete([5, 9, 3], max_tokens=3, seed=seed, **how), range(400))
        served = Counter(answer["token_ids"][1] for answer in answers if len(answer["token_ids"]) > 1)
    drawn = runtime.load(artifact).generate([[5, 9, 3]] * 400, max_new_tokens=3, seed=1, **how)
    engine = Counter(answer.tokens[1] for answer in drawn if len(answer.tokens) > 1)
    common = [token for token in served | engine if served[token] + engine[token] >= 10]
    assert len(common) > 1
    table = [[one[token] for token in common] for one in (served, engine)]
    assert chi2_contingency(table).pvalue > 1e-4


def test_a_seed_repeats_itself_and_greedy_neighbours_are_not_moved(server: Server) -> None:
    greedy = server.complete([5, 9, 3], max_tokens=20)["token_ids"]
    with ThreadPoolExecutor(4) as pool:
        both = list(
            pool.map(
                lambda how: server.complete([5, 9, 3], max_tokens=20, **how)["token_ids"],
                [{"temperature": 1.0, "seed": 7}, {}, {"temperature": 1.0, "seed": 7}, {}],
            )
        )
    assert both[1] == both[3] == greedy
    assert both[0] == both[2] != greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 21), ("min_p", 0.5), ("vllm_xargs", {"min_p": 1.5}), ("presence_penalty", 5),
        ("repetition_penalty", 0), ("min_tokens", 99), ("logit_bias", {"5": 1.0}), ("allowed_token_ids", [99999]),
        ("vllm_xargs", {"logit_bias": '{"99999": 1}'}), ("top_p", 1.5), ("prompt_logprobs", 21),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "none"}}}),
        ("thinking_token_budget", 5), ("prompt", [5] * 96), ("prompt", [999_999]), ("model", "unknown"),
    ],
)  # fmt: skip
def test_what_the_graphs_cannot_do_is_refused_by_name(server: Server, field: str, value: object) -> None:
    body = {"model": "served", "prompt": [5, 9], "max_tokens": 4, "temperature": 1} | {field: value}
    status, answer = server.post("/v1/completions", body)
    assert status in (400, 404), answer
    told = {"response_format": "type", "model": "unknown"}.get(field, field)
    told = next(iter(value)) if isinstance(value, dict) and field == "vllm_xargs" else told
    assert told in answer["error"]["message"] or "token" in answer["error"]["message"]


def test_bad_json_streams_stops_and_several_answers(server: Server) -> None:
    assert server.post("/v1/completions", b"{")[0] in (400, 422)
    whole = server.complete([5, 9, 3], max_tokens=12)
    body = {"model": "served", "prompt": [5, 9, 3], "temperature": 0, "max_tokens": 12}
    stream = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json.dumps(body | {"stream": True}).encode(),
        {"content-type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(stream, timeout=60) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == whole["text"]
    status, several = server.post(
        "/v1/completions", {"model": "served", "prompt": [5, 9, 3], "temperature": 1, "n": 3, "max_tokens": 5}
    )
    assert status == 200
    assert len(several["choices"]) == 3
    off = server.complete([5, 9, 3], max_tokens=12, vllm_xargs={"speculate": 0})
    assert off["token_ids"] == whole["token_ids"]


def test_disconnects_free_their_slots(server: Server) -> None:
    """Clients that go away in the middle: everyone after them is served as before."""
    whole = server.complete([5, 9, 3], max_tokens=20)["token_ids"]
    for _ in range(12):
        client = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({"model": "served", "prompt": [5] * 20, "max_tokens": 70, "ignore_eos": True, "stream": True})
        headers = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
        head = "\r\n".join(("POST /v1/completions HTTP/1.1", *headers, "", ""))
        client.sendall((head + body).encode())
        client.recv(100)
        client.close()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: server.complete([5, 9, 3], max_tokens=20)["token_ids"] == whole, range(16)))


def test_killed_and_started_again_it_serves(artifact: Path, tmp_path: Path) -> None:
    answers = []
    for life in range(2):
        with running(
            artifact, tmp_path / f"{life}.log", "--additional-config", '{"tandem": {"speculate_up_to": 1}}'
        ) as one:
            answers.append(one.complete([5, 9, 3], max_tokens=20)["token_ids"])
    assert answers[0] == answers[1]
    assert "compiled nothing" in (tmp_path / "1.log").read_text()


def test_told_to_end_it_finishes_its_answers(artifact: Path, tmp_path: Path) -> None:
    """Answers under way become whole. A request that reaches the engine later is rejected: vLLM's engine says so."""
    body = {"model": "served", "prompt": [5, 9, 3], "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
    with running(artifact, tmp_path / "log") as one, ThreadPoolExecutor(16) as pool:
        running_ = [pool.submit(one.post, "/v1/completions", body) for _ in range(16)]
        next(as_completed(running_)).result()
        one.process.send_signal(signal.SIGTERM)
        answers = [answer.result() for answer in running_]
        one.process.wait(timeout=60)
        log = one.log.read_text()
    lengths = Counter(len(answer["choices"][0]["token_ids"]) for status, answer in answers if status == 200)
    drained = re.search(r"draining in-flight requests count=(\d+)", log)
    assert drained, "nothing was under way: nothing is tested"
    assert int(drained[1]) > 4
    assert lengths[60] > int(drained[1]), "the drained answers, and the first"
    assert set(lengths) <= {60, 0}, "no answer is cut short"
    assert "Cannot access accelerator" not in log


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-num-seqs", "64"], "at most 4"),
        (["--max-model-len", "97"], "at most 96"),
        (["--dtype", "bfloat16"], "float32"),
        (["--tensor-parallel-size", "2"], "tensor-parallel-size: found 2"),
        (["--no-enable-chunked-prefill"], "enable-chunked-prefill: found False; no effect"),
        (["--block-size", "32"], "block-size: found 32; no effect"),
        (["--kv-cache-dtype", "fp8"], "kv-cache-dtype: found fp8; no effect"),
        (["--additional-config", '{"tandem": {"speculate_upto": 1}}'], "speculate_upto"),
        (["--max-num-seqz", "4"], "tandem: --max-num-seqz: neither tandem serve nor vLLM has it; did you mean"),
    ],
)
def test_flags_that_contradict_the_artifact_are_refused(
    artifact: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    server = Server(artifact, tmp_path / "log", *arguments)
    assert server.process.wait(timeout=START_SECONDS) != 0
    assert told in (log := server.log.read_text())
    assert "usage:" not in log


def test_an_artifact_for_another_processor_does_not_start(artifact: Path, tmp_path: Path) -> None:
    from pipeline.artifact.manifest import content_digest, dump, read

    other = tmp_path / "other"
    shutil.copytree(artifact, other)
    manifest = read(other).manifest
    manifest = manifest.model_copy(update={"requires": {**manifest.requires, "machine": "riscv64"}})
    (other / "manifest.json").write_bytes(
        dump(manifest.model_copy(update={"version": content_digest(manifest)[: len(manifest.version)]}))
    )
    server = Server(other, tmp_path / "log")
    assert server.process.wait(timeout=START_SECONDS) != 0
    last = server.log.read_text().strip().splitlines()[-1]
    assert "tandem:" in last
    assert "riscv64" in last


def test_a_damaged_artifact_does_not_start(artifact: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    weights = damaged / "weights/target/rank-0-of-1.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    server = Server(damaged, tmp_path / "log")
    assert server.process.wait(timeout=START_SECONDS) != 0
    last = server.log.read_text().strip().splitlines()[-1]
    assert "tandem:" in last
    assert "rank-0-of-1" in last


@pytest.mark.parametrize("name", ["truncation", "padding", "eos_by_config", "metaspace", "prefix_by_config_of_qwen2"])
def test_the_server_tokenizes_as_run_does(name: str, tmp_path: Path) -> None:
    """With `truncation` in the source's tokenizer.json, `run` read 6 of 19 tokens and the server all."""
    from transformers import AutoTokenizer
    from vllm.tokenizers import get_tokenizer

    from pipeline.runtime.text import Text
    from support import odd_tokenizers as odd

    odd.CASES[name](tmp_path / "source")
    reference = AutoTokenizer.from_pretrained(tmp_path / "source")
    folder = odd.packed(odd.checkpoint_of(tmp_path / "source"), tmp_path / "tokenizer")
    served, ours = get_tokenizer(str(folder)), Text(folder)
    for text in odd.TEXTS:
        assert served.encode(text) == ours.encode(text) == reference(text)["input_ids"]
