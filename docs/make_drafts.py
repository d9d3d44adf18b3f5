"""Write drafts.md: the public pairs in the table of `tandem init`."""

from __future__ import annotations

from pipeline.proposal.known import KnownDraft, known_drafts

INTRO = """\
# Known drafts

The table from which `tandem init` takes a draft ([how to](../how-to/init.md)): `pipeline/proposal/known_drafts.json`.
Each pair was found in a public text or is a recipe of this project. No draft was downloaded, and no claim was measured
here: `tandem draft doctor` and the gates of a build measure a pair. The first entry of a target that can be opened is
used.

| target | draft | method | K | licence of the draft | claim of its card | found in |
| --- | --- | --- | --- | --- | --- | --- |"""


def drafts_page() -> str:
    """Return drafts.md: a row for each known draft."""
    return "\n".join([INTRO, *map(_row, known_drafts())]) + "\n"


def _row(entry: KnownDraft) -> str:
    cells = (
        f"`{entry.target}`", f"`{entry.draft}`", entry.method, str(entry.draft_tokens),
        entry.license or "see its card", entry.claim or "-", entry.seen,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
