"""`tandem draft doctor`: the sources of a recipe, and its draft's agreement with the target. Compiles nothing."""

from __future__ import annotations

from pathlib import Path

from pipeline.cache.local import default_root
from pipeline.errors import HostError
from pipeline.memory import host_memory
from pipeline.progress import Log, Progress, stage
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import require_local
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.validate.draft.examine import Effort, chosen, examine, usable_dtype
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import recipe_prompts


def diagnose(recipe: Recipe, base: Path, size: tuple[int, int], log: Log, progress: Progress) -> DraftReport:
    """Return the report on a recipe's draft; `size` is the number of prompts, and of tokens of each answer.

    Raises:
        InputError: unreadable prompts. SourceError: sources that cannot be used.
        HostError: the target does not fit half of the memory.

    """
    prompts = recipe_prompts(recipe, base)
    pair = resolve_pair(recipe, base=base, cache=default_root() / "sources", progress=progress)
    for checkpoint in pair:
        require_local(checkpoint)
    memory = host_memory().available
    dtype = usable_dtype(pair[0], recipe.target.dtype, memory)
    if dtype is None:
        what = f"the target does not fit half of the available memory, {memory / (1 << 30):.1f} GiB"
        raise HostError(what, where=recipe.place("target"), fix="run the command on a larger machine")
    effort = Effort(*size, places=max(recipe.speculation.draft_tokens[-1], 2))
    cases = chosen(prompts, effort.prompts)
    with stage("agreement with the target", log, progress):
        return examine(recipe, pair, encoded_prompts(cases, tokenizer_files(pair[0])), dtype, effort, progress)
