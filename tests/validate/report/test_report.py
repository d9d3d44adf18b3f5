"""What is made from a report: JSON and schema, JUnit, Markdown, page, comparison. They agree, and are safe."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import main as cli
from pipeline.errors import InputError
from pipeline.measure.tune import choose, curve
from pipeline.validate.prompts import load_prompts
from pipeline.validate.reference.golden import RANKS, recorded_ids, summary
from pipeline.validate.report import compare, page, summaries
from pipeline.validate.report import schema as report
from pipeline.validate.run import make_report
from support import planted
from support.reports import PROMPTS, gates_of, recipe_of, report_of

TUNING = choose({1: {64: {2: 1.2, 4: 1.4}}}, {"all": [0.5] * 4, "<script>alert(1)</script>": [0.9] * 4})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("reports")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def good(work):
    return report_of(work, recipe_of("llama", 4, "bfloat16", price_per_hour=3.6))


@pytest.fixture(scope="module")
def bad(work, good):
    """Spoiled; times are the good one's, because those of two runs differ with the load of the machine."""
    found = report_of(work, recipe_of("llama", 4, "bfloat16"), planted.mask_sees_one_more)
    return found.model_copy(update={"speed": good.speed, "acceptance": good.acceptance})


def test_json_follows_its_schema_and_reads_back_equal(good):
    data = report.to_bytes(good)
    jsonschema.Draft202012Validator.check_schema(report.schema())
    jsonschema.validate(json.loads(data), report.schema())
    assert report.to_bytes(report.read(data, "here")) == data


def test_all_forms_tell_the_same_figures(good, bad):
    for one in (good, bad):
        markdown, html, tree = summaries.markdown(one), page.render(one), ET.fromstring(summaries.junit(one))
        failed = [gate.name for gate in one.gates if not gate.passed]
        assert [case.get("name") for case in tree if case.find("failure") is not None] == failed
        assert int(tree.get("failures")) == len(failed)
        for label, value in summaries.headlines(one):
            assert f"| {label} | {value} |" in markdown
            assert f"<dt>{label}</dt><dd>{value}</dd>" in html
        summary_of = summaries.summary(one)
        assert summary_of["passed"] == one.passed == (not failed)
        assert summary_of["error_over_noise"]["target"] == one.parity["target"].error_over_noise
        assert summary_of["speed"]["speculative"]["tokens_per_s"] == one.speed.speculative.tokens_per_s


def test_page_is_one_file_and_its_links_lead_somewhere(good, bad):
    for one in (good, bad):
        html = page.render(one)
        assert len(html) < 3_000_000
        assert not re.search(r"""(src|href)=["']?(https?:|//)""", html)
        assert "@import" not in html
        anchors = set(re.findall(r"""id=["']?([\w-]+)""", html))
        links = re.findall(r'href="#([^"]+)"', html) + re.findall(r"href='#([^']+)'", html)
        assert len(links) > 30
        assert not set(links) - anchors


def test_page_of_a_failure_says_so_first(bad):
    html = page.render(bad)
    assert "do not release" in html
    assert html.index("do not release") < html.index(">Summary<")


def test_page_shows_hostile_text_as_text(good):
    sequence = good.sequences[0].model_copy(update={"texts": ("</b><script>alert(1)</script>",), "name": "<img src=x>"})
    html = page.render(good.model_copy(update={"sequences": (sequence, *good.sequences[1:])}))
    assert "<script>alert" not in html
    assert "<img" not in html


def hostile(value):
    """The same data with markup in every text that names something, and a valid report still."""
    kept = {"format", "kind", "test", "created"}
    if isinstance(value, dict):
        return {key: child if key in kept else hostile(child) for key, child in value.items()}
    if isinstance(value, list):
        return [hostile(child) for child in value]
    return f"{value}-{MARKUP}" if isinstance(value, str) else value


MARKUP = "<script>alert(1)</script>'\"&"


def test_page_escapes_text_wherever_it_comes_from(good):
    """Names of prompts, classes, graphs and gates, findings, tokens, versions: none of them can add markup."""
    spoiled = report.Report.model_validate(hostile(good.model_dump(mode="json", by_alias=True)))
    gates = tuple(gate.model_copy(update={"findings": (MARKUP,)}) for gate in spoiled.gates)
    spoiled = spoiled.model_copy(update={"gates": gates})
    for html in (page.render(spoiled), compare.render(spoiled, spoiled), curve(TUNING, MARKUP)):
        assert html.count("<script") == 1, "the page's own"
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
        assert MARKUP not in html
        parser = Balance()
        parser.feed(html)
        assert parser.open == []


class Balance(HTMLParser):
    """Fails on an end tag without its start."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("near_ties", "tokens", "text"), [(0, 0, ""), (0, 3, ""), (203, 203, " (all near-ties)"), (2, 3, " (2 near-ties)")]
)
def test_near_ties_are_told_in_words(near_ties, tokens, text):
    assert summaries._near_ties(near_ties, tokens) == text


def test_logits_that_are_not_finite_fail_with_a_place(work):
    def spoil(ranks, seed):
        ranks.tensors["target/model.norm.weight"][3] = torch.nan

    found = report_of(work, recipe_of("llama", 4, "float32"), spoil)
    parity = next(gate for gate in found.gates if gate.name == "parity")
    assert re.search(r"not finite, first at p\d, position 0", parity.findings[0])
    json.loads(report.to_bytes(found), parse_constant=pytest.fail)
    assert page.render(found)


def test_of_a_prompt_that_does_not_fit_with_its_answer_the_end_runs(work):
    gates = gates_of(work, recipe_of("llama", 4, "float32"), prompts=[*PROMPTS, "over and over " * 30])
    found = make_report(gates, {})
    assert found.tested.cut_prompts == ("p5",)
    assert found.sequences[5].prompt_tokens == 38  # of 48 positions, with 10 new tokens
    assert found.passed


def test_empty_prompt_is_refused_by_line(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"id": "a", "class": "chat", "prompt": "x"}\n{"id": "b", "class": "chat", "prompt": " "}'
    )
    with pytest.raises(InputError, match="empty prompt") as error:
        load_prompts(tmp_path / "p.jsonl")
    assert error.value.where.endswith(":2:40")


def test_goldens_are_bounded_whatever_the_vocabulary():
    logits = torch.randn(3, 210_000)
    ids = recorded_ids(logits)
    found = summary(logits, ids)
    assert ids.shape == (3, len(RANKS))
    assert sum(t.nbytes for t in vars(found).values()) < 3 * 2000
    shifted = logits.clone()
    shifted[:, 150_000] += 30.0
    error = (summary(shifted, ids).projected - found.projected).pow(2).sum(-1)
    assert torch.allclose(error, torch.full((3,), 900.0 / 210_000, dtype=torch.float64), rtol=1e-6)


def test_cost_follows_the_price(good):
    per_s = good.speed.speculative.tokens_per_s
    assert good.speed.cost_per_million_tokens.speculative == pytest.approx(3.6 / 3600 / per_s * 1e6)


def test_compare_tells_worse_from_noise(good, bad):
    same = compare.compare(good, good)
    assert not any(change.beyond_noise for change in same)
    changes = {change.what: change for change in compare.compare(good, bad)}
    assert changes["gate parity passed"].worse
    assert changes["target: error over noise"].worse
    assert "Some measurements are worse beyond noise" in compare.render(good, bad)
    assert "Nothing is worse" in compare.render(bad, good)


def test_rank_test_notices_a_tenth_slower():
    generator = torch.Generator().manual_seed(0)
    one, other = (10 + torch.rand(60, generator=generator) for _ in range(2))
    assert compare.rank_differ(one.tolist(), other.tolist()) is False
    assert compare.rank_differ(one.tolist(), (other * 1.1).tolist()) is True


def test_report_command_compares_two_artifacts(good, bad, tmp_path):
    for name, one in (("a", good), ("b", bad)):
        (tmp_path / name / "reports").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
        (tmp_path / name / "reports" / "parity.json").write_bytes(report.to_bytes(one))
    out = tmp_path / "moved.html"
    done = CliRunner().invoke(cli.main, ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert re.search(r"gate parity passed +1\.00 +0\.00 +worse", done.output)
    assert out.read_text().startswith("<!doctype html>")
    schema = CliRunner().invoke(cli.main, ["report", "--schema"])
    assert json.loads(schema.output)["title"] == "Report"


def test_report_command_shows_gates_and_headlines_as_tables(good, bad, tmp_path):
    """It printed Markdown source on a terminal."""
    for whole, verdict in ((good, "passed"), (bad, "FAILED")):
        root = tmp_path / verdict
        (root / "reports").mkdir(parents=True)
        (root / "manifest.json").write_text("{}")
        (root / "reports" / "parity.json").write_bytes(report.to_bytes(whole))
        (root / "recipe.yaml").write_text(recipe_of("llama", 4, "bfloat16").to_yaml())
        done = CliRunner().invoke(cli.main, ["report", str(root)])
        assert done.exit_code == 0, done.output
        title, *lines = done.stdout.splitlines()
        assert title == f"{whole.name} {whole.version}: validation {verdict}"
        assert lines[1].split() == ["gate", "verdict", *([] if whole.passed else ["findings"])]  # no empty column
        assert re.search(r"tokens per step \(K=2\) +\d\.\d\d \(limit: at least 1\)", done.stdout)
        for gate, line in zip(whole.gates, lines[2:], strict=False):
            assert line.split()[:2] == [gate.name, "passed" if gate.passed else "FAILED"]
            assert "".join(gate.findings[:1]) in line
        for label, value in summaries.headlines(whole):
            limit = r"( \(limit: at least 1\))?"
            assert re.search(rf"^{re.escape(label)} +{re.escape(value)}{limit}$", done.stdout, re.MULTILINE)
        assert not {"|", "**", "##"} & set(done.stdout.split())


def test_sequences_keep_their_prompts_apart(good):
    assert [s.name for s in good.sequences[: len(PROMPTS)]] == [f"p{i}" for i in range(len(PROMPTS))]
    assert all(len(s.texts) == len(s.tokens) for s in good.sequences)
