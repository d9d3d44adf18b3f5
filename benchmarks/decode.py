"""Decode of one artifact beside other engines on the same weights: one run, the same prompts, interleaved.

    python benchmarks/decode.py [ARTIFACT] [--draft-model ARTIFACT] [--vllm PYTHON] [--llama PYTHON --precision Q8_0]

Contenders, batch 1, greedy: the artifact plain, with each K, and with K by policy; a second artifact whose draft is a
model; transformers' `generate`, and its assisted generation with that model; vLLM, plain, with its n-gram speculation
and with the artifact's own EAGLE-3 head; llama.cpp at a precision (`peers.py` says what their environments need).
With `--alone` only the first of these. Structured prompts (code, JSON) and the others apart. A contender's figure is
the median over rounds of its tokens over its time after each first token.

The roofline: bytes of weights that a plain step reads, over the read bandwidth that this run measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bars import bars
from serving import export

from pipeline.cache.local import default_root
from pipeline.measure.hf_model import transformers_answers
from pipeline.recipe import load as load_recipe
from pipeline.runtime.engine import Engine
from pipeline.runtime.latency import Answer, DecodeTotals, TimedRequest, engine_answer
from pipeline.runtime.open import load
from pipeline.sources.pair import resolve
from pipeline.validate.prompts import load_prompts, prompts_path

STRUCTURED = ("code", "json")
GROUPS = ("all", "structured", "others")
READ_BYTES = 512 << 20


def bandwidth() -> float:
    """Bytes a second that a sum over a large tensor reads, the best of several."""
    data = torch.ones(READ_BYTES // 4)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = max(best, READ_BYTES / (time.perf_counter() - started))
    return best


Contender = Callable[[list[int]], DecodeTotals]
"""Answers a prompt: tokens after the first one, their seconds, and steps."""


def totals(answer: Answer) -> Contender:
    """What is left of a timed answer."""
    return lambda tokens: answer(tokens).totals


def without_lookup(engine: Engine, answer: Answer) -> Answer:
    """Answers of an artifact that looks nothing up."""
    manifest = engine.batch.manifest

    def alone(tokens: list[int]) -> TimedRequest:
        engine.batch.manifest = manifest.model_copy(update={"lookup": None})
        try:
            return answer(tokens)
        finally:
            engine.batch.manifest = manifest

    return alone


def contenders(root: Path, other: Path | None, limit: int, *, alone: bool) -> tuple[dict[str, Contender], Engine]:
    """All of them, by name, and the first artifact's engine."""
    engine = load(root, share_prefixes=False)
    answers = {"plain decode": engine_answer(engine, limit, speculate=False)}
    answers |= {f"K={k}": engine_answer(engine, limit, draft_tokens=k) for k in engine.manifest.draft_tokens}
    if engine.manifest.step_costs:
        answers["K by policy"] = engine_answer(engine, limit)
    if engine.manifest.lookup:
        k = engine.manifest.draft_tokens[-1]
        answers[f"K={k}, the draft alone"] = without_lookup(engine, engine_answer(engine, limit, draft_tokens=k))
    if not alone:
        if other is not None:
            second = load(other, share_prefixes=False)
            answers[f"draft model, K={second.manifest.draft_tokens[0]}"] = engine_answer(second, limit)
        answers |= transformers_answers(load_recipe((other or root) / "recipe.yaml"), Path("recipes"), limit)
    return {name: totals(answer) for name, answer in answers.items()}, engine


class Peer:
    """An engine in a process of its own (`peers.py`)."""

    def __init__(self, python: Path, *arguments: object) -> None:
        command = [str(python), "-W", "ignore", str(Path(__file__).with_name("peers.py")), *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"ended without an answer: {self.process.args}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def contender(self, limit: int) -> Contender:
        """Answers through it."""

        def answer(tokens: list[int]) -> DecodeTotals:
            assert self.process.stdin is not None
            print(json.dumps({"tokens": tokens, "limit": limit}), file=self.process.stdin, flush=True)
            reply = self._line()
            return DecodeTotals(reply["tokens"], reply["seconds"], reply["steps"])

        return answer

    def end(self) -> None:
        """Close its input and wait."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peers(asked: argparse.Namespace, work: Path, *, speculating: bool = True) -> dict[str, Peer]:
    """The engines that were asked for, loaded; `speculating` also with each way to speculate."""
    recipe = load_recipe(asked.artifact / "recipe.yaml")
    engines: dict[str, Peer] = {}
    if asked.vllm is not None:
        target = resolve(recipe.target.source, base=Path("recipes"), cache=default_root() / "sources")
        folder = export(target, work / "target")
        length = ("--length", recipe.shapes.kv[-1])
        engines["vLLM"] = Peer(asked.vllm, "vllm", folder, *length)
        if speculating:
            engines["vLLM, n-gram K=4"] = Peer(asked.vllm, "vllm", folder, "--ngram", 4, *length)
        if speculating and recipe.speculation.method == "eagle3":
            head = resolve(
                recipe.draft.source, base=Path("recipes"), cache=default_root() / "sources", role="draft"
            ).root
            for k in recipe.speculation.draft_tokens:
                engines[f"vLLM, EAGLE-3 K={k}"] = Peer(asked.vllm, "vllm", folder, "--eagle3", head, k, *length)
    if asked.llama is not None:
        (source,) = (default_root() / "sources" / "packages").rglob("*.gguf")
        engines[f"llama.cpp {asked.precision}"] = Peer(asked.llama, "llama", source, asked.precision)
    return engines


def weight_bytes(root: Path) -> int:
    """Weights that a plain step reads: the target's shard; an embedding apart from the head is a row."""
    return (root / "weights" / "target" / "rank-0-of-1.safetensors").stat().st_size


Cells = dict[str, DecodeTotals]
"""By class of prompt."""

Rounds = dict[str, list[Cells]]
"""By contender."""


def measure(answers: dict[str, Contender], encoded: list[tuple[str, list[int]]], rounds: int) -> Rounds:
    """All contenders answer a prompt before any answers the next; a first answer of each is not counted."""
    for answer in answers.values():
        answer(encoded[0][1])
    by_contender: Rounds = {name: [] for name in answers}
    for _ in range(rounds):
        for cells in by_contender.values():
            cells.append({kind: DecodeTotals() for kind, _ in encoded})
        for kind, tokens in encoded:
            for name, answer in answers.items():
                by_contender[name][-1][kind] += answer(tokens)
    return by_contender


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--draft-model", type=Path, help="an artifact of the same target whose draft is a model")
    parser.add_argument("--alone", action="store_true", help="the artifact's own contenders only")
    parser.add_argument("--vllm", type=Path, help="python of an environment that has vLLM")
    parser.add_argument("--llama", type=Path, help="python of an environment that has xllamacpp and gguf")
    parser.add_argument("--precision", choices=["BF16", "Q8_0", "Q4_0"], default="BF16", help="of llama.cpp's weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2, help="of each class")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    args = parser.parse_args()
    recipe = load_recipe(args.artifact / "recipe.yaml")
    prompts = load_prompts(prompts_path(recipe.validate_.prompts, Path("recipes")))
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    chosen = [p for kind in kinds for p in [q for q in prompts if q.kind == kind][: args.prompts]]
    answers, engine = contenders(args.artifact, args.draft_model, args.max_new_tokens, alone=args.alone)
    work = tempfile.TemporaryDirectory()
    others = peers(args, Path(work.name))
    answers |= {name: peer.contender(args.max_new_tokens) for name, peer in others.items()}
    encoded = [(p.kind, engine.text.chat(p.text)) for p in chosen]
    rounds = measure(answers, encoded, args.rounds)
    for peer in others.values():
        peer.end()
    work.cleanup()
    speeds = {name: {group: speed(runs, group) for group in GROUPS} for name, runs in rounds.items()}
    show(rounds, speeds)
    if "K by policy" in rounds:
        ratios = {kind: speed(rounds["K by policy"], kind) / speed(rounds["plain decode"], kind) for kind in kinds}
        print("\nK by policy over plain: " + ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items()))
    if args.plot is not None:
        args.plot.write_text(bars("Decode, one request at a time, tokens/s", speeds), encoding="utf-8")
    read = bandwidth()
    limit = read / weight_bytes(args.artifact)
    plain = speeds["plain decode"]["all"]
    print(f"\nread bandwidth {read / 1e9:.1f} GB/s, {weight_bytes(args.artifact) / 1e6:.0f} MB a plain step: at most "
          f"{limit:.1f} tokens/s; plain decode is {plain / limit:.2f} of it")  # fmt: skip


def speed(rounds: list[Cells], group: str) -> float:
    """Tokens a second after the first ones, over a class or a group of them: the median of rounds."""
    kinds = [k for k in rounds[0] if group in (k, "all", "structured" if k in STRUCTURED else "others")]
    return median(sum((cells[k] for k in kinds), DecodeTotals()).tokens_per_s for cells in rounds)


def show(rounds: Rounds, speeds: dict[str, dict[str, float]]) -> None:
    """The table."""
    print("| | " + " | ".join(f"{name}, tokens/s | over plain" for name in GROUPS) + " | tokens per step |")
    print("|" + " --- |" * (2 * len(GROUPS) + 2))
    for name, runs in rounds.items():
        rates = [
            cell
            for group, rate in speeds[name].items()
            for cell in (f"{rate:.1f}", f"{rate / speeds['plain decode'][group]:.2f}")
        ]
        whole = sum((of for cells in runs for of in cells.values()), DecodeTotals())
        print(f"| {name} | " + " | ".join(rates) + f" | {whole.tokens_per_step:.2f} |")


if __name__ == "__main__":
    main()
