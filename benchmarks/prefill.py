"""Time to the first token: prompts of several lengths beside other engines, and the tenth turn of a chat.

    PYTHONPATH=. python benchmarks/prefill.py [ARTIFACT] [--vllm PYTHON] [--llama PYTHON] [--rounds 5]

All contenders read a prompt before any reads the next, and answer with one token; figures are medians over rounds, with
tokens per second and the operations per second of the target's matrices (two for each weight and token). Prompts are
pieces of one text. The chat: each turn adds 40 tokens of a user and 40 of an answer. "as its new tokens" compares the
tenth turn with a prompt of its new tokens alone, with and without sharing what earlier turns left in the caches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from decode import peers

from pipeline.measure.hf_model import transformers_answers
from pipeline.models.weights import EMBEDDING, weight_specs
from pipeline.recipe import load as load_recipe
from pipeline.runtime import Engine, load
from pipeline.validate.prompts import recipe_prompts

TURNS, TURN_TOKENS = 10, 40

Reads = Callable[[list[int]], object]
"""Reads a prompt and answers with one token."""


def text_of(engine: Engine, recipe_folder: Path, root: Path) -> list[int]:
    """Tokens of all prompts of the recipe, one after the other."""
    recipe = load_recipe(root / "recipe.yaml")
    prompts = recipe_prompts(recipe, recipe_folder)
    return [token for prompt in prompts for token in engine.text.encode(prompt.text)]


def seconds(reads: Reads, tokens: list[int]) -> float:
    """Time of one prompt."""
    started = time.perf_counter()
    reads(tokens)
    return time.perf_counter() - started


def ours(engine: Engine) -> Reads:
    """The artifact's prefill graphs."""
    return lambda tokens: engine.generate([tokens], max_new_tokens=1, temperature=0.0)


def operations(engine: Engine) -> int:
    """Of the target's matrices for a token of a prompt, the head aside: two for each weight."""
    elements = 0
    for weight in weight_specs(engine.manifest.pair.target):
        if weight.kind != "vector" and weight.name != EMBEDDING and "lm_head" not in weight.name:
            rows, columns = weight.shape
            elements += rows * columns
    return 2 * elements


def lengths(contenders: dict[str, Reads], text: list[int], asked: argparse.Namespace, of_token: int) -> None:
    """Print a table of prompts of each length."""
    print("| tokens | engine | ms | tokens/s | GFLOP/s | ours over it |\n|---|---|---|---|---|---|")
    for length in asked.lengths:
        prompts = [text[31 * turn : 31 * turn + length] for turn in range(asked.rounds + 1)]
        took: dict[str, list[float]] = {name: [] for name in contenders}
        for number, tokens in enumerate(prompts):
            for name, reads in contenders.items():
                found = seconds(reads, tokens)
                if number:  # the first is a warm-up
                    took[name].append(found)
        own = median(took["ours"])
        for name, found in took.items():
            each = median(found)
            rate = length / each
            print(f"| {length} | {name} | {each * 1e3:.0f} | {rate:.0f} | {rate * of_token / 1e9:.0f} | "
                  f"{each / own:.2f} |", flush=True)  # fmt: skip


def chat(root: Path, text: list[int], rounds: int) -> None:
    """Print the time to the first token of the tenth turn, over that of its new tokens alone."""
    print("\n| tenth turn of a chat | ms | as its new tokens |\n|---|---|---|")
    for shares in (True, False):
        with load(root, share_prefixes=shares) as engine:
            reads, turns, alone = ours(engine), [], []
            for turn in range(rounds + 1):
                start = 97 * turn
                ends = [start + 2 * TURN_TOKENS * number + TURN_TOKENS for number in range(TURNS)]
                found = [seconds(reads, text[start:end]) for end in ends]
                other = seconds(reads, text[-start - 3 * TURN_TOKENS : len(text) - start - TURN_TOKENS])
                if turn:
                    turns.append(found[-1])
                    alone.append(other)
            name = "shared prefixes" if shares else "nothing shared"
            print(f"| {name} | {median(turns) * 1e3:.0f} | {median(turns) / median(alone):.2f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--vllm", type=Path, help="python of an environment that has vLLM")
    parser.add_argument("--llama", type=Path, help="python of an environment that has xllamacpp and gguf")
    parser.add_argument("--precision", choices=["BF16", "Q8_0"], default="BF16", help="of llama.cpp's weights")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512, 900])
    asked = parser.parse_args()
    with load(asked.artifact, share_prefixes=False) as engine, tempfile.TemporaryDirectory() as work:
        text = text_of(engine, Path("recipes"), asked.artifact)
        contenders: dict[str, Reads] = {"ours": ours(engine)}
        if not asked.no_transformers:
            answers = transformers_answers(load_recipe(asked.artifact / "recipe.yaml"), Path("recipes"), 1)
            contenders |= dict(answers)
        others = peers(asked, Path(work), speculating=False)
        contenders |= {name: peer.contender(1) for name, peer in others.items()}
        lengths(contenders, text, asked, operations(engine))
        for peer in others.values():
            peer.end()
    chat(asked.artifact, text, asked.rounds)


if __name__ == "__main__":
    main()
