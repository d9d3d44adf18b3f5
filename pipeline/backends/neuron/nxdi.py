"""The same recipe for NxD Inference: the configuration of its fused speculation, and what of a recipe it cannot do.

For servers that already run vLLM's NxDI-backed plugin (0.5.x). Written from neuronx-distributed-inference 0.9
(models/config, inference_demo, model_base); nothing here was run with it. Imports no torch; compiling is NxDI's own.

Its `speculation_length` counts the tokens that the target verifies, K + 1 here; a last draft pass fills the cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, RecipeError
from pipeline.files import write_atomic

if TYPE_CHECKING:
    from pipeline.lock import Lock
    from pipeline.plan import Plan

CLASSES = {
    "llama": ("neuronx_distributed_inference.models.llama.modeling_llama", "Llama"),
    "mistral": ("neuronx_distributed_inference.models.mistral.modeling_mistral", "Mistral"),
    "qwen2": ("neuronx_distributed_inference.models.qwen2.modeling_qwen2", "Qwen2"),
    "qwen3": ("neuronx_distributed_inference.models.qwen3.modeling_qwen3", "Qwen3"),
}
CONFIG, PACKAGE, SCRIPT = "neuron_config.json", "tandem-nxdi.json", "compile.py"
OWN_TP_FAMILIES = ("llama",)
"""Families whose modules ask for the group they belong to: only their draft may have fewer ranks than the target."""

PLACES = {"target": "models/target", "draft": "models/draft"}
"""Where the package expects the checkpoints, relative to itself; made absolute by `localize`."""


@dataclass(frozen=True)
class Package:
    """What NxD Inference is asked for, and what vLLM is told."""

    neuron_config: dict[str, Any]
    draft_neuron_config: dict[str, Any]
    application: tuple[str, str]
    draft_application: tuple[str, str]
    vllm: dict[str, Any]


def problems(plan: Plan) -> list[Problem]:
    """What of a recipe NxD Inference's fused speculation does not do; nothing is silently left out."""
    return list(_problems(plan))


def package(plan: Plan) -> Package:
    """Configuration for a recipe that NxD Inference can serve.

    Raises:
        RecipeError: every reason why it cannot.

    """
    found = problems(plan)
    if found:
        raise RecipeError(found)
    recipe, pair = plan.recipe, plan.pair
    (k,) = recipe.speculation.draft_tokens
    shapes, rows = recipe.shapes, recipe.shapes.batch[-1]
    common = {
        "tp_degree": pair.tp, "batch_size": rows, "max_batch_size": rows, "ctx_batch_size": 1, "tkg_batch_size": rows,
        "is_continuous_batching": rows > 1, "seq_len": shapes.kv[-1], "max_context_length": shapes.prefill[-1],
        "torch_dtype": recipe.target.dtype, "logical_nc_config": plan.recipe.backend.lnc,  # type: ignore[union-attr]
        "enable_bucketing": True, "context_encoding_buckets": list(shapes.prefill),
        "token_generation_buckets": list(shapes.kv), "save_sharded_checkpoint": True,
        "on_device_sampling_config": {"do_sample": False, "dynamic": False, "deterministic": True, "top_k": 1},
    }  # fmt: skip
    target = {**common, "speculation_length": k + 1, "enable_fused_speculation": True}
    draft = {**common, "speculation_length": 0, "enable_fused_speculation": False, "tp_degree": pair.tp_of("draft")}
    return Package(target, draft, _classes(pair.target.family), _classes(pair.draft.family), _vllm(plan, k))


def write(out: Path, plan: Plan, lock: Lock) -> Path:
    """Write the package and the script that compiles it on a host with NxD Inference; checkpoints are not copied.

    Raises:
        RecipeError: the recipe asks for what NxD Inference does not do.

    """
    made = package(plan)
    sources = {"target": asdict(lock.target), "draft": asdict(lock.draft) if lock.draft else None}
    recorded = {
        **asdict(made),
        "recipe": plan.recipe.name,
        "recipe_sha256": plan.recipe.digest(),
        "checkpoints": {role: {"path": PLACES[role], "source": source} for role, source in sources.items()},
    }
    write_atomic(out / PACKAGE, json.dumps(recorded, indent=1, sort_keys=True).encode() + b"\n")
    write_atomic(out / SCRIPT, COMPILE.encode())
    return out / PACKAGE


def relative(config: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """NxDI's `neuron_config.json` with the absolute paths that it bakes in made relative to the package."""
    return _paths(dict(config), lambda text: f"./{Path(text).relative_to(root).as_posix()}", str(root))


def localize(config: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The inverse, where the package was pulled to: NxDI opens its checkpoints by absolute path."""
    return _paths(dict(config), lambda text: str(root / text.removeprefix("./")), "./")


def _paths(value: Any, change: Any, prefix: str) -> Any:
    if isinstance(value, dict):
        return {key: _paths(inner, change, prefix) for key, inner in value.items()}
    if isinstance(value, list):
        return [_paths(inner, change, prefix) for inner in value]
    return change(value) if isinstance(value, str) and value.startswith(prefix) else value


def _problems(plan: Plan) -> Iterator[Problem]:
    recipe, pair = plan.recipe, plan.pair
    place = recipe.place
    if recipe.backend.name != "neuron":
        yield Problem(place("backend.name"), f"found {recipe.backend.name}", "use name: neuron")
    if "stochastic" in recipe.speculation.sampling:
        what = "found stochastic; NxD Inference verifies a draft model's tokens by argmax alone, and samples the first"
        yield Problem(place("speculation.sampling"), what, "use [greedy], or the neuron backend, which has both")
    if len(recipe.speculation.draft_tokens) > 1:
        what = f"found {list(recipe.speculation.draft_tokens)}; NxD Inference compiles one speculation length"
        yield Problem(place("speculation.draft_tokens"), what, "write one K")
    if pair.draft.draft_vocab is not None or pair.draft.shares_embedding:
        what = "the draft has a reduced vocabulary or no embedding; NxD Inference needs a whole model"
        yield Problem(place("draft"), what, "use a draft with its own embedding and the target's vocabulary")
    if recipe.draft.derive is not None:
        yield Problem(place("draft.derive"), "NxD Inference reads the draft from a checkpoint", "write it out first")
    if pair.tp_of("draft") != pair.tp and pair.draft.family not in OWN_TP_FAMILIES:
        what = f"a {pair.draft.family} draft cannot have other ranks than its target in NxD Inference"
        yield Problem(place("draft.placement"), what, "write placement: sharded")
    if pair.target_dtype != pair.draft_dtype:
        what = f"found {pair.draft_dtype}, the target is {pair.target_dtype}"
        yield Problem(place("draft.dtype"), what, "use the target's dtype")


def _classes(family: str) -> tuple[str, str]:
    module, name = CLASSES[family]
    return module, f"Neuron{name}ForCausalLM"


def _vllm(plan: Plan, k: int) -> dict[str, Any]:
    """Environment and arguments of `vllm serve`. NxDI does not guard the last positions, so they are not offered."""
    shapes = plan.recipe.shapes
    return {
        "environment": {"NEURON_COMPILED_ARTIFACTS": ".", "VLLM_NEURON_FRAMEWORK": "neuronx-distributed-inference"},
        "arguments": {
            "model": PLACES["target"],
            "tensor-parallel-size": plan.pair.tp,
            "max-num-seqs": shapes.batch[-1],
            "max-model-len": shapes.kv[-1] - (k + 1),
            "speculative-config": {"model": PLACES["draft"], "num_speculative_tokens": k + 1},
        },
    }


COMPILE = '''\
"""Compile this package with NxD Inference: python compile.py, beside models/target and models/draft.

Makes model.pt, weights/ and neuron_config.json, whose paths become relative.
"""

import importlib
import json
from pathlib import Path

from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

from pipeline.backends.neuron import nxdi

root = Path(__file__).resolve().parent
made = json.loads((root / nxdi.PACKAGE).read_text())


def application(key):
    module, name = made[key]
    return getattr(importlib.import_module(module), name)


def config(key, settings, role):
    cls, path = application(key), str(root / nxdi.PLACES[role])
    neuron = cls.get_neuron_config_cls()(**made[settings])
    return cls.get_config_cls()(neuron, load_config=load_pretrained_config(path))


target = config("application", "neuron_config", "target")
draft = config("draft_application", "draft_neuron_config", "draft")
target.fused_spec_config = FusedSpecNeuronConfig(
    application("application")._model_cls,
    draft_config=draft,
    draft_model_path=str(root / nxdi.PLACES["draft"]),
    draft_model_cls=application("draft_application"),
)
application("application")(str(root / nxdi.PLACES["target"]), target).compile(str(root) + "/")
written = root / nxdi.CONFIG
written.write_text(json.dumps(nxdi.relative(json.loads(written.read_text()), root), indent=2, sort_keys=True))
'''
