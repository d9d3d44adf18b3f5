"""plan --traffic: the table, JSON, the recipe that is written, and options that need each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.recipe import load
from support import families
from support.commands import RECIPE, answer, invoke

SHORT = '{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n'
LOG = SHORT * 3 + '{"prompt_tokens": 20, "completion_tokens": 2}\n'
SHAPES = "shapes: {batch: [1], prefill: [16], kv: [64]}"


@pytest.fixture
def traffic(work):
    (work / "mine.yaml").write_text(
        "# a pair\n" + RECIPE.replace("shapes: {batch: [1], prefill: [16], kv: [32]}", SHAPES + "  # measured")
    )
    (work / "log.jsonl").write_text(LOG)
    return work


def test_plan_shows_the_buckets_of_traffic(traffic):
    before = (traffic / "mine.yaml").read_text()
    shown = answer("plan", "mine.yaml", "--traffic", "log.jsonl").stdout
    assert shown.splitlines()[:3] == [
        "kind               buckets  padding  graphs",
        "prefill  now       16         2.56x       1",
        "prefill  proposed  32         4.41x       1",
    ]
    assert "4 requests in log.jsonl; at most 5 graphs\n1 prompt longer than the largest prefill bucket" in shown
    assert "--write writes the proposed buckets to the recipe" in shown
    assert (traffic / "mine.yaml").read_text() == before


def test_plan_writes_the_buckets_and_keeps_comments(traffic):
    shown = answer("plan", "mine.yaml", "--traffic", "log.jsonl", "--graphs", "6", "--write").stdout
    assert "written to mine.yaml; lock and build the recipe again" in shown
    assert load(traffic / "mine.yaml").shapes.prefill == (32,)
    text = (traffic / "mine.yaml").read_text()
    assert text.startswith("# a pair\n")
    assert "prefill: [32], kv: [64]}  # measured\n" in text
    assert "plan" not in invoke("plan", "mine.yaml").stderr


def test_plan_of_traffic_as_json(traffic):
    data = json.loads(answer("plan", "mine.yaml", "--traffic", "log.jsonl", "--graphs", "7", "--json").stdout)
    assert data["requests"] == 4
    assert data["rejected_by_recipe"] == 1
    assert data["graph_budget"] == 7
    assert data["now"]["prefill"] == {"buckets": [16], "graphs": 1, "padding": 64 / 25}
    assert data["now"]["graphs"] == data["proposed"]["graphs"] == 5


def test_plan_does_not_write_buckets_of_a_base(traffic):
    (traffic / "base.yaml").write_text(SHAPES)
    (traffic / "mine.yaml").write_text("base: base.yaml\n" + "\n".join(RECIPE.splitlines()[:-1]) + "\n")
    result = invoke("plan", "mine.yaml", "--traffic", "log.jsonl", "--write")
    assert result.exit_code == 2
    assert "mine.yaml: the file has no `shapes.prefill`" in result.stderr
    assert "write to `shapes`: prefill: [32], kv: [64]" in result.stderr


@pytest.mark.parametrize("option", [("--graphs", "9"), ("--write",)])
def test_plan_rejects_options_that_need_traffic(traffic, option):
    result = invoke("plan", "mine.yaml", *option)
    assert result.exit_code == 2
    assert f"{option[0]}: option without --traffic" in result.stderr


def test_plan_names_the_line_of_a_request_that_does_not_fit(traffic):
    (traffic / "log.jsonl").write_text(LOG + '{"prompt_tokens": 60, "completion_tokens": 9}\n')
    result = invoke("plan", "mine.yaml", "--traffic", "log.jsonl")
    assert result.exit_code == 2
    assert "log.jsonl:5:1: 60 prompt tokens and 9 answer tokens do not fit the largest kv bucket 64" in result.stderr


def test_plan_of_the_example_is_what_the_how_to_shows(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    page = (root / "docs" / "how-to" / "recipe.md").read_text()
    command = "tandem plan llama-8b-spec --traffic examples/traffic.csv --graphs 52"
    assert f"$ {command}\n{answer(*command.split()[1:]).stdout}```" in page


def test_plan_shows_the_rings_of_windows_and_what_they_save(work):
    """In words, and as JSON: the bytes of whole caches without the rings' are those that are saved."""
    changes = {"sliding_window": 16, "max_position_embeddings": 512}
    families.write_pair(families.Family("Mistral", changes, "json-config"), work / "windows")
    recipe = (
        "name: windows\ntarget: {source: ./target, dtype: float32}\ndraft: {derive: {from: target, layers: [0]}}\n"
        "speculation: {draft_tokens: [2]}\nshapes: {batch: [2], prefill: [32], kv: [400]}\n"
    )
    (work / "windows" / "windows.yaml").write_text(recipe)
    shown = answer("plan", "windows/windows.yaml").stdout
    assert "caches of layers with a window of 16: 128 of 400 positions\nwhole caches need " in shown
    data = json.loads(answer("plan", "windows/windows.yaml", "--json").stdout)
    assert data["rings"] == [{"window": 16, "slots": 128}]
    of_position = 2 * 2 * 2 * 16 * 4  # rows, keys and values, heads, values of a head, bytes
    assert data["memory_bytes_per_rank"]["target_kv"] == 3 * 129 * of_position
    assert data["memory_bytes_per_rank"]["draft_kv"] == 129 * of_position
    assert data["saved_by_rings_bytes_per_rank"] == 4 * (400 - 129) * of_position
