"""inspect, verify, diff: fields and tables, in plain terms, of real small artifacts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.artifact.manifest import read
from pipeline.artifact.reports import add_reports
from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair

INSPECTED = """\
artifact       small DIGEST
digest         FULL
path           out
built          TIME UTC
signature      not signed
runs on        device cpu, isa avx2, machine x86_64
toolchain      backend stand-in, cxx g++ 12, torch 2.13.0+cpu
ranks          1
dtype          float32
draft          draft_model, draft tokens K 2
prompt lookup  no
sampling       greedy
candidates     all
buckets        batch 1; prefill 16; kv 32
graphs         5
end tokens     2
by default     greedy
files          26, SIZE
gates          passed
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An artifact `out` that passed its gates, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return small.make_validated(tmp_path / "out", tmp_path / "work").root


def masked(text: str) -> str:
    """Digests, sizes and times as words, for golden text."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "FULL", re.sub(r"\d+\.\d KiB", "SIZE", text))
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME", re.sub(r"\b[0-9a-f]{12}\b", "DIGEST", text))


def test_inspect_prints_values_in_plain_terms(out):
    """It printed Python dicts: `{'device': 'cpu', ...}`."""
    assert masked(answer("inspect", "out").stdout) == INSPECTED


def test_inspect_leads_from_the_short_id_to_the_whole_digest(out):
    shown = answer("inspect", "out").stdout
    version = read(out).manifest.version
    assert f"small {version}\n" in shown
    assert re.search(rf"^digest +{version}[0-9a-f]{{52}}$", shown, re.M)


QWEN = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 1.1, "eos_token_id": [2]}


def test_inspect_names_the_defaults_that_are_not_applied(tmp_path, monkeypatch):
    """The model's generation_config.json was reduced to its end-of-sequence ids, and no command said so."""
    monkeypatch.chdir(tmp_path)
    small.make(tmp_path / "out", tmp_path / "work", generation=QWEN)
    left_out = "do_sample=true (no stochastic graphs were built), repetition_penalty=1.1"
    assert f"by default     greedy\nnot applied    {left_out}\n" in answer("inspect", "out").stdout
    data = json.loads(answer("inspect", "out", "--json").stdout)
    assert data["generation"]["temperature"] == 0.01
    assert data["not_applied"] == left_out.split(", ")


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        (None, "gates          not validated\n"),
        ({"passed": True, "gates": {"parity": [], "acceptance": []}}, "gates          passed: acceptance, parity\n"),
        (
            {"passed": False, "gates": {"parity": [], "acceptance": ["K=2: 1.10 is below the floor 1.3"]}},
            "gates          FAILED; acceptance: K=2: 1.10 is below the floor 1.3\n",
        ),
    ],
)
def test_inspect_says_what_the_gates_found(tmp_path, monkeypatch, summary, said):
    monkeypatch.chdir(tmp_path)
    small.make(tmp_path / "out", tmp_path / "work")
    if summary:
        add_reports(tmp_path / "out", {"parity.json": b"{}"}, summary)
    assert said in answer("inspect", "out").stdout


def test_verify_says_who_signed_and_only_after_a_check(out, tmp_path):
    """`verify` printed the same with and without a required signature."""
    key, public = key_pair(tmp_path, "key")
    assert masked(answer("verify", "out").stdout).endswith("26 files match the manifest, SIZE; not signed\n")
    answer("sign", "out", "--key", key)
    assert "; signature not checked (--require-signature)\n" in answer("verify", "out").stdout
    shown = answer("verify", "out", "--require-signature", public).stdout
    assert shown.endswith(f"; signed by {public}\n")


def test_verify_json_does_not_deny_a_signature(out, tmp_path):
    """`signed` was false for a signed artifact whose signature was not checked."""
    key, public = key_pair(tmp_path, "key")
    states = [json.loads(answer("verify", "out", "--json").stdout)]
    answer("sign", "out", "--key", key)
    states.append(json.loads(answer("verify", "out", "--json").stdout))
    states.append(json.loads(answer("verify", "out", "--require-signature", public, "--json").stdout))
    assert [state["signature"] for state in states] == ["none", "not checked", "accepted"]
    assert [state["signer"] for state in states] == [None, None, str(public)]


def test_verify_of_a_part_says_how_much_was_checked(out):
    answer("publish", "out", "--to", "r", "--alias", "latest")
    answer("pull", "r/small", "part", "--only", "weights")
    assert re.search(r"\d+ of 26 files match", answer("verify", "part", "--only", "weights").stdout)


def test_verify_of_a_part_of_a_whole_artifact_does_not_call_the_rest_foreign(out):
    """Files of the manifest were said to be `not in the manifest`."""
    result = invoke("verify", "out", "--only", "weights")
    assert result.exit_code == 2
    assert "graphs/decode-b1-t1-s32/graph.bin: not in the part that is verified" in result.stderr
    assert "not in the manifest" not in result.stderr
    assert "fix: omit --only to verify the whole artifact" in result.stderr


def test_inspect_names_the_command_that_checks_the_signature(out, tmp_path):
    """It named --require-signature, an option that `inspect` does not have."""
    answer("sign", "out", "--key", key_pair(tmp_path, "key")[0])
    line = "signature      present, not checked; to check: tandem verify out --require-signature KEY\n"
    assert line in answer("inspect", "out").stdout


def test_verify_of_a_pulled_part_says_how_to_check_it(out):
    """It listed every missing file in one line, and advised to pull or build again."""
    answer("publish", "out", "--to", "r", "--alias", "latest")
    answer("pull", "r/small", "part", "--only", "graphs")
    shown = invoke("verify", "part").stderr
    assert re.search(r"artifact: part: only a part was pulled \(--only graphs\): \d+ of 26 files are not here\n", shown)
    assert "fix: `tandem verify part --only graphs` checks that part; pull it without --only to have all files" in shown
    answer("verify", "part", "--only", "graphs")


@pytest.mark.parametrize("pull", [(), ("--only", "graphs")])
def test_verify_of_a_pulled_artifact_without_a_file_names_it(out, pull):
    """A deleted file was an error of the input, `pulled with --only?`, while a changed one was damage."""
    answer("publish", "out", "--to", "r", "--alias", "latest")
    answer("pull", "r/small", "p", *pull)
    Path("p/graphs/decode-b1-t1-s32/graph.bin").unlink()
    refused = invoke("verify", "p")
    assert refused.exit_code == 5
    assert "corrupt: p: graphs/decode-b1-t1-s32/graph.bin: missing\n" in refused.stderr


@pytest.mark.parametrize("name", ["r/small@latest", "r/small", "s3://bucket/small@1.0"])
def test_run_of_a_release_says_to_pull_it(out, name):
    """It said `no artifact`, though `serve` takes the same words."""
    answer("publish", "out", "--to", "r", "--alias", "latest")
    result = invoke("run", name, "--prompt", "x")
    assert result.exit_code == 2
    assert f"{name}: a release in a registry, not a folder\n  fix: tandem pull {name}, then" in result.stderr


def test_diff_of_a_release_without_a_version_is_latest(out):
    """`pull` assumed @latest, `diff` said `no artifact`."""
    answer("publish", "out", "--to", "r", "--alias", "latest")
    assert answer("diff", "r/small", "out").stdout.startswith("no difference: ")


def test_diff_names_versions_and_leaves_out_what_looks_equal(out, tmp_path):
    """Its columns had digests alone, seven rows of speeds, and `1.04  1.04` as a difference."""
    speeds = {"speculative": {"tokens_per_s": 10.0, "first_token_ms": 1.0}, "plain": {"tokens_per_s": 5.0}}
    for name, noise in (("a", 1.0401), ("b", 1.0402)):
        made = small.make_validated(tmp_path / name, tmp_path / "work", graph=name.encode())
        data = json.loads((made.root / "manifest.json").read_text())
        gates = {"parity": []} | ({"distribution": []} if name == "b" else {})
        data["validation"] |= {"error_over_noise": {"target": noise}, "gates": gates}
        data["validation"]["speed"] = {k: {n: v * noise for n, v in s.items()} for k, s in speeds.items()}
        data["validation"]["speed"]["speculative"]["tokens_per_s"] *= 2 if name == "b" else 1
        (made.root / "manifest.json").write_text(json.dumps(data))
    answer("publish", "a", "--to", "r", "--version", "1.0")
    shown = answer("diff", "r/small@1.0", "b").stdout
    assert shown.split()[0] == "small@1.0"
    assert re.search(r"validation.gates.distribution +- +passed", shown)
    assert "error_over_noise" not in shown
    assert shown.count("validation.speed") == 1


def test_diff_of_measured_values_alone_does_not_call_them_equal(out, tmp_path):
    data = json.loads((out / "manifest.json").read_text())
    for name, noise in (("a", 1.0401), ("b", 1.0402)):
        (tmp_path / name).mkdir()
        validation = data["validation"] | {"error_over_noise": {"target": noise}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(data | {"validation": validation}))
    assert "differ in measured values only; --json has them\n" in answer("diff", "a", "b").stdout


def test_diff_shows_both_values_in_columns(out, tmp_path):
    small.make_validated(tmp_path / "other", tmp_path / "work", passed=False, graph=b"other")
    lines = [line.split("  ") for line in masked(answer("diff", "out", "other").stdout).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["small DIGEST", "small DIGEST"]
    assert ["graph decode-b1-t1-s32", "recompiled"] in cells
    assert ["validation.passed", "yes", "no"] in cells
    assert ["files: graphs", "5 files changed"] in cells


def test_diff_rounds_numbers(out, tmp_path):
    """It printed floats of 17 digits."""
    small.make(tmp_path / "other", tmp_path / "work")
    add_reports(tmp_path / "other", {"parity.json": b"{}"}, {"passed": True, "tokens_per_step": {"2": 0.1 + 0.2}})
    assert "0.3" in answer("diff", "out", "other").stdout
    assert "0.300000" not in answer("diff", "out", "other").stdout
    fields = json.loads(answer("diff", "out", "other", "--json").stdout)["fields"]
    assert fields["validation.tokens_per_step.2"]["to"] == 0.1 + 0.2, "--json has all digits"


def test_diff_of_equal_artifacts_says_so(out):
    """It printed nothing."""
    equal = "the manifests of small DIGEST and small DIGEST are equal (files not read: tandem verify)"
    assert masked(answer("diff", "out", "out").stdout) == f"no difference: {equal}\n"


def test_a_folder_that_is_no_artifact_is_named_with_what_is_expected(out, tmp_path):
    """`inspect /tmp` said: artifacts: no artifact '/tmp'."""
    (tmp_path / "empty").mkdir()
    shown = invoke("inspect", tmp_path / "empty").stderr
    assert f"{tmp_path / 'empty'}: not an artifact: expected a folder with manifest.json" in shown


def test_a_missing_artifact_names_the_places_that_were_looked_at(out):
    shown = invoke("inspect", "nothing").stderr
    assert "no artifact 'nothing': no folder `nothing` or `artifacts/nothing`" in shown


def test_a_name_that_no_artifact_has_lists_pulled_ones(out):
    """`serve small` listed `in artifacts/: none`, though artifacts/pulled/small existed."""
    small.make_validated(out.parent / "artifacts/pulled/small", out.parent / "work2")
    result = invoke("inspect", "small")
    assert result.exit_code == 2
    assert "fix: name an artifact's folder; in artifacts/: pulled/small\n" in result.stderr
    assert answer("inspect", "pulled/small").exit_code == 0
