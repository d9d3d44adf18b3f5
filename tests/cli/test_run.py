"""run, bench: the answer, why it ended, and warnings of artifacts that failed their gates."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest

from pipeline.artifact.manifest import SIGNATURE
from pipeline.cli import facts, run
from pipeline.cli.run import _answer_words, _option_names, _text_of
from pipeline.errors import InputError
from pipeline.graphs.arguments import Choice
from pipeline.models.generation import GenerationDefaults
from pipeline.registry.publish import publish
from pipeline.registry.pull import pull
from pipeline.runtime.calls import Generation
from pipeline.runtime.limits import check_choice
from pipeline.runtime.rules import Rules
from support import small_artifacts as small
from support.commands import invoke


def answer_of(tokens: int, steps: list[int], reason: str) -> Generation:
    return Generation([5] * tokens, "", len(steps), sum(steps) - len(steps), reason, steps, [False] * len(steps))


ENDS = [
    (answer_of(16, [3, 3, 3, 3, 3], "length"), "16 tokens; 5 speculative steps, tokens per step: 3.00",
     "limit of --max-new-tokens"),
    (answer_of(9, [2, 2], "stop"), "9 tokens; 2 speculative steps, tokens per step: 2.00", "end-of-sequence token"),
    (answer_of(9, [], "stop"), "9 tokens; no speculative step", "end-of-sequence token"),
    (answer_of(12, [3], "length"), "12 tokens; 1 speculative step, tokens per step: 3.00",
     "full cache (32 tokens of prompt and answer); for longer answers, build a larger kv bucket"),
]  # fmt: skip


@pytest.mark.parametrize(("generation", "gain", "end"), ENDS)
def test_answer_words_say_why_it_ended(generation, gain, end):
    """`--max-new-tokens 500` stopped at 233 without a word; plain decode had `tokens per step: 0.00`."""
    assert _answer_words(generation, 16, 20) == f"{gain}; ended by: {end}"


def test_a_schema_file_that_is_not_utf8_is_an_error(tmp_path):
    """It ended with a traceback."""
    (tmp_path / "schema.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8: byte 0xff at index 7") as caught:
        _text_of(tmp_path / "schema.json")
    assert caught.value.where == str(tmp_path / "schema.json")


@pytest.mark.parametrize(
    ("choice", "option"),
    [(Choice(-1.0), "--temperature"), (Choice(0.0, top_k=-2), "--top-k"), (Choice(1.0), "--temperature")],
)
def test_an_unaccepted_setting_names_its_option(tmp_path, choice, option):
    """It named `temperature`, the parameter of the Python function."""
    manifest = small.make(tmp_path / "out", tmp_path / "work").manifest
    with pytest.raises(InputError) as caught, _option_names():
        check_choice(manifest, choice)
    assert caught.value.where == option


FAILED = "warning: small failed its gates: `tandem report ARTIFACT`"


@pytest.mark.parametrize(("passed", "said"), [(True, None), (False, FAILED)])
def test_gate_warning(tmp_path, passed, said):
    """`run` used an artifact that failed its gates without a word."""
    manifest = small.make_validated(tmp_path / "out", tmp_path / "work", passed=passed).manifest
    warning = facts.gate_warning(manifest)
    assert warning is None if said is None else warning.startswith(said)


def test_gate_warning_names_the_gates_that_failed(tmp_path):
    manifest = small.make(tmp_path / "out", tmp_path / "work").manifest
    assert "was not validated" in facts.gate_warning(manifest)
    validation = {"passed": False, "gates": {"parity": [], "acceptance": ["low"]}}
    failed = manifest.model_copy(update={"validation": validation})
    assert "failed its gates (acceptance)" in facts.gate_warning(failed)


@pytest.mark.parametrize("signed", [False, True])
def test_a_pulled_artifact_without_a_check_is_named(tmp_path, signed):
    """`run` opened native code of an unsigned release without a word."""
    artifact = small.make_validated(tmp_path / "out", tmp_path / "work")
    said = partial(facts.unchecked_warning, artifact.manifest)
    assert said(artifact.root, checked=False) is None, "it was built here"
    publish(artifact.root, str(tmp_path / "registry"), ["prod"])
    pulled = pull(f"{tmp_path}/registry/small@prod", tmp_path / "pulled", cache=tmp_path / "cache")
    if signed:
        (pulled / SIGNATURE).write_text("{}")
    state = "its signature was not checked" if signed else "it is not signed"
    assert f"runs native code, and {state}: `--policy FILE`" in said(pulled, checked=False)
    assert said(pulled, checked=True) is None


def test_run_names_it_once(tmp_path, monkeypatch):
    artifact = small.make_validated(tmp_path / "out", tmp_path / "work")
    publish(artifact.root, str(tmp_path / "registry"), ["prod"])
    pull(f"{tmp_path}/registry/small@prod", tmp_path / "pulled", cache=tmp_path / "cache")
    ended = InputError("opened", where="here", fix="nothing")

    def generate(*_, **__):
        raise ended

    text = SimpleNamespace(encode_prompt=lambda prompt: [1], decode=str)
    settings = {"choice": lambda *_: Choice(), "defaults": GenerationDefaults(), "rules": Rules, "generate": generate}
    opened = SimpleNamespace(manifest=artifact.manifest, text=text, **settings)
    monkeypatch.setattr(run, "load", lambda *_: opened)
    shown = invoke("run", tmp_path / "pulled", "--prompt", "a")
    assert shown.stderr.count("runs native code") == 1, shown.output


BOTH = ("greedy", "stochastic")
QWEN = GenerationDefaults(True, 0.01, 1, 0.8, unsupported={"repetition_penalty": 1.1, "min_p": 0.1})
LEFT_OUT = "warning: generation_config.json: not applied: {}; answers differ from those of transformers"


@pytest.mark.parametrize(
    ("choice", "how", "lines"),
    [
        (Choice(0.01, 1, 0.8), {"sampling": BOTH, "given": False},
         ["sampling: temperature 0.01, top_k 1, top_p 0.8", LEFT_OUT.format("repetition_penalty=1.1, min_p=0.1")]),
        (Choice(0.0), {"sampling": BOTH, "given": True}, [LEFT_OUT.format("repetition_penalty=1.1")]),
        (Choice(0.01, 1, 0.8), {"sampling": (*BOTH, "shaped"), "given": False},
         ["sampling: temperature 0.01, top_k 1, top_p 0.8"]),
        (Choice(0.0), {"sampling": ("greedy",), "given": False},
         [LEFT_OUT.format("do_sample=true (no stochastic graphs were built), repetition_penalty=1.1")]),
    ],
)  # fmt: skip
def test_settings_of_the_model_are_said_at_the_start(choice, how, lines):
    """`run` ignored the repetition penalty of the model without a word."""
    assert list(facts.settings_lines(QWEN, choice, **how)) == lines


def test_a_model_without_defaults_needs_no_line():
    assert list(facts.settings_lines(GenerationDefaults(), Choice(0.0), ("greedy",), given=False)) == []


def test_run_json_is_one_line(capsys):
    """It printed a list item per line."""
    from pipeline.cli.results import print_json

    print_json({"tokens": [1, 2, 3]}, one_line=True)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"tokens": [1, 2, 3]}
    assert printed.count("\n") == 1
