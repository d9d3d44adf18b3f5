"""Steps of every kind on one cache: the tokens are plain decode's, the caches those of one pass from scratch."""

import pytest
import torch

from pipeline.graphs.arguments import Choice
from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.schema import Recipe
from pipeline.runtime.batch import Batch, Row
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 3, 5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8], [11, 30]]
ALL = (0, 1, 2, 3)
STEPS = {
    "decode": [(0, ALL)] * 4,
    "speculate": [(4, ALL), (2, ALL)] * 3,
    "mixed": [
        (0, ALL), (2, ALL), (4, ALL), (0, ALL), (0, ALL), (0, ALL), (4, ALL),
        *[(0, (1, 2))] * 7, (2, ALL), (0, (0,)), (4, (0, 3)), (0, (2,)), (0, (2,)), (4, ALL), (2, (1,)),
    ],
}  # fmt: skip
"""K, 0 for plain decode, and the slots that take part. Seven tokens decoded alone are two pieces to catch up with."""

DRAFTS = {
    "whole": {"draft": {"derive": {"from": "target", "layers": (0, 1, 2)}}},  # agrees always
    "layer": {"draft": {"derive": {"from": "target", "layers": (0,)}}},  # agrees often
    "head": {"draft": {"source": "pico://llama?draft_vocab=128&eagle3=1"}, "method": "eagle3", "lookup": 1},
}
"""An untrained head agrees never: what is accepted there was copied."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("batch")


def batch_of(work, draft: dict, method: str = "draft_model", lookup: int | None = None) -> Batch:
    recipe = Recipe.model_validate(
        {
            "name": "mixed",
            "target": {"source": "pico://llama", "dtype": "float32"},
            "draft": draft,
            "speculation": {"method": method, "draft_tokens": (2, 4), "lookup": lookup},
            "shapes": {"batch": (1, 4), "prefill": (4, 8), "kv": (24, 64)},
        }
    )
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources")).batch


def prefilled(batch: Batch) -> dict[int, Row]:
    rows = {slot: Row(list(prompt), len(prompt), 0, Choice()) for slot, prompt in enumerate(PROMPTS)}
    for slot, token in batch.prefill(rows).items():
        rows[slot].tokens.append(token)
    return rows


def advance(batch: Batch, rows: dict[int, Row], steps: int) -> None:
    for slot, new in (batch.speculate(rows, steps) if steps else batch.decode(rows)).items():
        rows[slot].tokens.extend(new)


def from_scratch(batch: Batch, rows: dict[int, Row]) -> dict[str, torch.Tensor]:
    """Caches of both models after one pass over everything that the rows have read."""
    longest = max(row.position for row in rows.values())
    tokens = torch.tensor([(row.tokens[:-1] + [0] * longest)[:longest] for row in rows.values()], dtype=torch.int32)
    for model in ("target", "draft"):
        spec = GraphSpec("score", len(rows), longest, batch.length + 1, model=model)
        batch.ranks.run(spec, {"tokens": tokens, "position": torch.zeros(len(rows), dtype=torch.int32)})
    return {name: cache for name, cache in batch.ranks.state().items() if "/k." in name or "/v." in name}


def check_caches(batch: Batch, rows: dict[int, Row], wanted: dict[str, torch.Tensor]) -> None:
    """As far as they reach: a head one token less than the target, a draft model as far as its row says."""
    head = batch.manifest.draft_kind.reads_target_states
    for slot, row in rows.items():
        reach = {"target": row.position, "draft": row.position - 1 if head else row.in_draft}
        for name, cache in wanted.items():
            end = reach[name.split("/")[0]]
            error = (batch.ranks.state()[name][slot, :, :end] - cache[slot, :, :end]).abs().max()
            assert error < 1e-5, f"{name} of row {slot}: {error:.2e}"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_steps_give_plain_tokens_and_whole_caches(work, draft, steps):
    """Rows of different lengths that sit some steps out; caches are compared after every step."""
    batch, other = batch_of(work, **DRAFTS[draft]), batch_of(work, **DRAFTS[draft])
    rows = prefilled(batch)
    for drafted, slots in STEPS[steps]:
        taking = {slot: rows[slot] for slot in slots}
        advance(batch, taking, drafted)
        if drafted:
            assert all(row.in_draft >= row.position - 1 for row in taking.values())
        check_caches(batch, rows, from_scratch(other, rows))
    assert (batch.stats["catch_ups"] > 1) == (steps == "mixed" and draft != "head")
    plain = prefilled(other)
    while any(len(plain[slot].tokens) < len(row.tokens) for slot, row in rows.items()):
        advance(other, plain, 0)
    for slot, row in rows.items():
        assert row.tokens == plain[slot].tokens[: len(row.tokens)]
