"""Log probabilities of the tokens of prompts, by `score` graphs, which every artifact has."""

from __future__ import annotations

from pipeline.graphs.arguments import ScoreRow, score_arguments
from pipeline.runtime.batch import Batch, Rows
from pipeline.runtime.logprobs import TokenLogProbs, of_known_tokens


def prompt_logprobs(batch: Batch, rows: Rows, count: int) -> dict[int, list[TokenLogProbs]]:
    """Return those of each prompt's tokens but the first, with the `count` most probable tokens at each.

    The target's caches then hold the prompts, as after `Batch.prefill`.
    """
    longest = max(row.prompt for row in rows.values())
    found: dict[int, list[TokenLogProbs]] = {slot: [] for slot in rows}
    spec = batch.score_graph("target", longest)
    for start in range(0, longest - 1, spec.tokens):
        end = start + spec.tokens
        pieces = {
            slot: ScoreRow(row.tokens[start : min(end, row.prompt)], start)
            for slot, row in rows.items()
            if start < row.prompt - 1
        }
        logits = batch.ranks.run(spec, score_arguments(spec, pieces, batch.length))["logits"]
        for slot in pieces:
            rows[slot].wrote(end)
            following = rows[slot].tokens[start + 1 : min(end + 1, rows[slot].prompt)]
            found[slot] += of_known_tokens(logits[slot, : len(following)], following, count)
    return found
