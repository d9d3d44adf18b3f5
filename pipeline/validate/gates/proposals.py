"""Gate 2, shaped: do propose graphs propose what the draft itself chooses? Each graph once, at the end of the caches.

Requests with rules get their drafts from these graphs. A wrong proposal changes no answer, only its speed, which no
answer of the gates shows. Greedy rows are compared with the draft's teacher-forced logits, which parity compares with
the reference: of a draft model after every proposal, of a head, which reads its own output later, after the last token.

Shapes: K draft tokens, D vocabulary of the draft.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.graphs.arguments import StepRow, step_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.sources.values import draft_token_ids
from pipeline.validate.gates.driving import Row, rewind
from pipeline.validate.gates.exact_tests import Drawn
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.scoring import score


def check_proposals(inputs: GateInputs, spec: GraphSpec, probes: Sequence[list[int]], tie: float) -> Drawn:
    """Return the findings on a propose graph; the caches hold the probes."""
    engine, ids_D = inputs.engine, draft_token_ids(inputs.checkpoints[1])
    usable = min(spec.kv, engine.length)
    rows = [Row(list(probe[: usable - spec.draft_tokens - row % 2])) for row, probe in enumerate(probes[: spec.batch])]
    plain = next(g for g in engine.graphs if g.phase == "decode" and (g.batch, g.kv) == (spec.batch, spec.kv))
    rewind(engine, plain, rows)
    given = {slot: StepRow(row.tokens[-1], len(row.tokens) - 1) for slot, row in enumerate(rows)}
    drafts = engine.ranks.run(spec, step_arguments(spec, given))["drafts"].tolist()
    drawn = Drawn(spec.name)
    for slot, logits_KD in enumerate(_own_logits(engine, spec, rows, drafts)):
        for place, (token, logits_D) in enumerate(zip(drafts[slot], logits_KD, strict=False), 1):
            if not _is_best(logits_D[: engine.manifest.vocab], ids_D, token, tie):
                drawn.faults.append(f"proposes token {token} in place {place}, which the draft does not choose")
    return drawn


def _own_logits(
    engine: Engine, spec: GraphSpec, rows: Sequence[Row], drafts: Sequence[list[int]]
) -> list[Tensor]:  # fmt: skip
    """Return the draft's logits after each row's last token, and after its proposals, if these are read as tokens."""
    scorer = next(g for g in engine.graphs if (g.phase, g.model, g.kv) == ("score", "draft", spec.kv))
    is_head = engine.manifest.draft_kind.reads_target_states
    further = [[] if is_head else [max(token, 0) for token in own[:-1]] for own in drafts]  # -1: none
    read = [row.tokens + own for row, own in zip(rows, further, strict=True)]
    return score(engine, scorer, read, [len(row.tokens) - 1 for row in rows])


def _is_best(logits_D: Tensor, ids_D: Tensor | None, token: int, tie: float) -> bool:
    """Return whether the draft's best token is `token`, an id of the target, up to noise."""
    places = [token] if ids_D is None else (ids_D == token).nonzero()[:, 0].tolist()
    best, noise = float(logits_D.max()), 2 * tie * float(logits_D.abs().max())
    return any(0 <= place < len(logits_D) and float(logits_D[place]) >= best - noise for place in places)
