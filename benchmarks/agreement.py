"""Greedy answers of a served artifact and of plain vLLM on the same target, 8 at once: equal, but for near-ties.

    python benchmarks/agreement.py [ARTIFACT]

To be run by the environment that has vLLM (eager, so that it starts soon). Where two answers part, the gap between the
two tokens' logits is compared with bfloat16's noise at the median token of the artifact's report, as in `soak.py`.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving import MODULE, Server, export
from soak import Load, judged

from pipeline.cache.local import default_root
from pipeline.recipe import load
from pipeline.sources.pair import resolve
from pipeline.validate.prompts import load_prompts, prompts_path


def main() -> None:
    """Print how many of 64 answers are equal, and the gaps of the others."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/smollm2-135m-spec")
    recipe = load(root / "recipe.yaml")
    prompts = [p.text for p in load_prompts(prompts_path(recipe.validate_.prompts, Path("recipes")))][:64]
    with tempfile.TemporaryDirectory() as work:
        target = resolve(recipe.target.source, base=Path("recipes"), cache=default_root() / "sources")
        folder, length = export(target, Path(work) / "target"), str(recipe.shapes.kv[-1])
        plain = [*MODULE, "--model", str(folder), "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", length]
        servers = [
            Server([*MODULE, "--model", str(root)], Path(work) / "a"),
            Server(plain, Path(work) / "b", VLLM_CPU_KVCACHE_SPACE="2"),
        ]
        try:
            for server in servers:
                server.first_token(prompts[0])
            ours, theirs = (Load(server.port, {}) for server in servers)
            with ThreadPoolExecutor(8) as pool:
                theirs.right = list(pool.map(theirs.whole, prompts))
                answers = list(pool.map(ours.whole, prompts))
        finally:
            for server in servers:
                server.end()
    theirs.prompts = prompts
    for number, text in enumerate(answers):
        theirs.same(number, text)
    theirs.others |= set(theirs.seen.others)
    faults = judged(root, theirs)
    print(f"{len(prompts)} answers: {len(prompts) - len(theirs.others)} equal, {len(theirs.others)} part, "
          f"{len(faults)} of them by more than bfloat16's noise")  # fmt: skip
    print(*faults[:5], sep="\n")


if __name__ == "__main__":
    main()
