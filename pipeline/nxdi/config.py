"""Settings of NxD Inference for a recipe: its configuration, unsupported settings, and settings it ignored.

For servers that already run vLLM's NxDI-backed plugin (0.5.x). Written from neuronx-distributed-inference 0.9
(models/config, models/application_base, inference_demo, model_base). Imports no torch and not NxD Inference.

Its `speculation_length` counts the tokens that the target verifies, K + 1 here; a last draft pass fills the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.backends.neuron import support
from pipeline.errors import Problem, RecipeError
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.recipe.schema import Nxdi, Recipe

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

CLASSES = {
    "llama": ("neuronx_distributed_inference.models.llama.modeling_llama", "Llama"),
    "mistral": ("neuronx_distributed_inference.models.mistral.modeling_mistral", "Mistral"),
    "qwen2": ("neuronx_distributed_inference.models.qwen2.modeling_qwen2", "Qwen2"),
    "qwen3": ("neuronx_distributed_inference.models.qwen3.modeling_qwen3", "Qwen3"),
}
CONFIG, MODEL = "neuron_config.json", "model.pt"
OWN_TP_FAMILIES = ("llama",)
"""Families whose modules look up their own process group: only their draft may have fewer ranks than the target."""

DECIDED = frozenset((
    "tp_degree", "batch_size", "max_batch_size", "ctx_batch_size", "tkg_batch_size", "is_continuous_batching",
    "seq_len", "max_context_length", "torch_dtype", "logical_nc_config", "enable_bucketing", "save_sharded_checkpoint",
    "on_device_sampling_config", "speculation_length", "enable_fused_speculation",
))  # fmt: skip
"""Keys of NeuronConfig that follow from other keys of a recipe."""

MODEL_FOLDERS = {"target": "models/target", "draft": "models/draft"}
"""Folders of the pair's configs and tokenizer, relative to the artifact: vLLM is started inside it."""

DISTRIBUTION = "neuronx-distributed-inference"
RELEASES = {"2.28": "0.8", "2.29": "0.9", "2.30": "0.10.17970", "2.31": "0.10.18399"}
"""Version of NxD Inference in each SDK release of `support.RELEASES` (n2-manifest.json)."""

NEWER_CHIPS_FROM = "2.29"
"""Since this SDK NxD Inference runs on Trn2 only (release notes of the component)."""


@dataclass(frozen=True)
class NxdiSettings:
    """Settings of NxD Inference for target and draft, their classes (module, name), and vLLM's settings."""

    neuron_config: dict[str, Any]
    draft_neuron_config: dict[str, Any]
    application: tuple[str, str]
    draft_application: tuple[str, str]
    vllm: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the compile, beside those of the chip."""


def neuron_settings(recipe: Recipe) -> NeuronSettings:
    """Return the recipe's backend section, which is Neuron's for every recipe without `problems`."""
    assert isinstance(recipe.backend, NeuronSettings)
    return recipe.backend


def problems(plan: Plan) -> list[Problem]:
    """Return everything in a recipe that NxD Inference's fused speculation does not support."""
    return list(_problems(plan))


def settings(plan: Plan) -> NxdiSettings:
    """Return the settings of NxD Inference and vLLM for a recipe.

    Raises:
        RecipeError: everything that NxD Inference does not support.

    """
    if unsupported := problems(plan):
        raise RecipeError(unsupported)
    recipe, pair = plan.recipe, plan.pair
    (k,) = recipe.speculation.draft_tokens
    shapes, rows = recipe.shapes, recipe.shapes.batch[-1]
    common: dict[str, Any] = {
        "tp_degree": pair.models.tp,
        "batch_size": rows, "max_batch_size": rows, "ctx_batch_size": 1, "tkg_batch_size": rows,
        "is_continuous_batching": rows > 1, "seq_len": shapes.kv[-1], "max_context_length": shapes.prefill[-1],
        "torch_dtype": recipe.target.dtype, "logical_nc_config": neuron_settings(recipe).lnc,
        "enable_bucketing": True, "context_encoding_buckets": list(shapes.prefill),
        "token_generation_buckets": list(shapes.kv), "save_sharded_checkpoint": True,
        "on_device_sampling_config": {"do_sample": False, "dynamic": False, "deterministic": True, "top_k": 1},
    }  # fmt: skip
    own = recipe.nxdi or Nxdi()
    common |= {name: list(value) if isinstance(value, tuple) else value for name, value in own.config.items()}
    target = {**common, "speculation_length": k + 1, "enable_fused_speculation": True}
    draft = {
        **common,
        "speculation_length": 0,
        "enable_fused_speculation": False,
        "tp_degree": pair.models.tp_of("draft"),
    }
    classes = _classes(pair.target.family), _classes(pair.draft.family)
    return NxdiSettings(target, draft, *classes, _vllm(plan, k), dict(own.environment))


def weight_file(rank: int) -> str:
    """Return the path at which NxD Inference writes and reads a rank's weights of both models."""
    return f"weights/tp{rank}_sharded_checkpoint.safetensors"


def differences(expected: NxdiSettings, written: Mapping[str, Any]) -> list[str]:
    """Return settings that NxD Inference did not accept: it only logs a warning about an unknown key.

    `written` is its `neuron_config.json`.
    """
    fused = written.get("fused_spec_config") or {}
    draft = (fused.get("draft_config") or {}).get("neuron_config") or {}
    target = written.get("neuron_config") or {}
    return [
        *_different(expected.neuron_config, target, "neuron_config"),
        *_different(expected.draft_neuron_config, draft, "fused_spec_config.draft_config.neuron_config"),
    ]


def relative(config: Mapping[str, Any], folders: Mapping[str, str]) -> dict[str, Any]:
    """Return NxD Inference's `neuron_config.json` with absolute paths replaced by paths in the artifact.

    `folders` maps a folder of the build to one of the artifact. No process needs the absolute paths: weights are
    sharded, and vLLM is given relative paths of its models.
    """

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        return folders.get(value.rstrip("/"), value) if isinstance(value, str) else value

    return {key: replaced(value) for key, value in config.items()}


def host_problems(chip: str, lnc: int, versions: Mapping[str, str], inference: str) -> list[Problem]:
    """Return why this host cannot compile with NxD Inference; `versions` and `inference` are installed versions."""
    return [*support.problems(chip, lnc, versions), *_inference_problems(chip, versions, inference)]


def _inference_problems(chip: str, versions: Mapping[str, str], inference: str) -> Iterator[Problem]:
    newest = support.RELEASES[-1]
    install = f"{newest.install()} '{DISTRIBUTION}=={RELEASES[newest.sdk]}.*'"
    if inference == "missing":
        yield Problem("packages", f"not installed: {DISTRIBUTION}", install)
        return
    if inference == support.PLACEHOLDERS[DISTRIBUTION]:
        what = f"{DISTRIBUTION} {inference} is the empty placeholder of PyPI, not the SDK's package"
        yield Problem("packages", what, f"pip uninstall {DISTRIBUTION}, then {install}")
        return
    release = support.release_of(versions.get("neuronx-distributed", "missing"))
    if release is None:
        return  # `support.problems` reports it
    expected = RELEASES[release.sdk]
    if not support.begins(inference, expected):
        what = f"{DISTRIBUTION} {inference}; neuronx-distributed is of SDK {release.sdk}, which has {expected}.*"
        yield Problem("packages", what, f"pip install --extra-index-url {support.INDEX} '{DISTRIBUTION}=={expected}.*'")
    if chip in ("trn1", "inf2") and list(RELEASES).index(release.sdk) >= list(RELEASES).index(NEWER_CHIPS_FROM):
        what = f"NxD Inference of SDK {release.sdk} does not run on {chip}: since {NEWER_CHIPS_FROM} it needs trn2"
        yield Problem("backend.target", what, support.RELEASES[0].install())


def _different(expected: Mapping[str, Any], written: Mapping[str, Any], key: str) -> Iterator[str]:
    for name, value in expected.items():
        actual = written.get(name)
        if isinstance(value, dict) and isinstance(actual, dict):
            yield from _different(value, actual, f"{key}.{name}")
        elif actual != value:
            yield f"{key}.{name}: expected {value!r}, NxD Inference wrote {actual!r}"


def _problems(plan: Plan) -> Iterator[Problem]:
    recipe = plan.recipe
    place = recipe.place
    if recipe.backend.name != "neuron":
        yield Problem(place("backend.name"), f"found {recipe.backend.name}", "use name: neuron")
    own = recipe.nxdi or Nxdi()
    if beyond := set(own.sampling or recipe.speculation.sampling) - {"greedy"}:
        what = f"found {', '.join(sorted(beyond))}; NxD Inference verifies draft tokens "
        what += "by argmax only, and samples only the first token"
        yield Problem(
            place("speculation.sampling"), what, "write nxdi: {sampling: [greedy]}, or use the neuron backend"
        )
    if len(recipe.speculation.draft_tokens) > 1:
        what = f"found {list(recipe.speculation.draft_tokens)}; NxD Inference compiles one speculation length"
        yield Problem(place("speculation.draft_tokens"), what, "write one K")
    if recipe.speculation.lookup is not None:
        what = f"found {recipe.speculation.lookup}; NxD Inference's fused graphs accept only the draft's tokens"
        yield Problem(place("speculation.lookup"), what, "remove speculation.lookup, or use the neuron backend")
    yield from _override_problems(recipe, own)
    yield from _draft_problems(plan)


def _override_problems(recipe: Recipe, own: Nxdi) -> Iterator[Problem]:
    for name in sorted(own.config.keys() & DECIDED):
        yield Problem(recipe.place(f"nxdi.config.{name}"), "other keys of the recipe decide it", "remove it")
    ends = {"context_encoding_buckets": recipe.shapes.prefill[-1], "token_generation_buckets": recipe.shapes.kv[-1]}
    for name, last in ends.items():
        found = own.config.get(name, (last,))
        if not isinstance(found, tuple) or list(found) != sorted(set(found)) or found[-1:] != (last,):
            what = (
                f"found {list(found) if isinstance(found, tuple) else found}; expected ascending lengths up to {last}"
            )
            yield Problem(recipe.place(f"nxdi.config.{name}"), what, f"end it with {last}, as `shapes` does")
    if own.max_model_len is not None and own.max_model_len > recipe.shapes.kv[-1]:
        what = f"found {own.max_model_len}, longer than the largest cache bucket, {recipe.shapes.kv[-1]}"
        yield Problem(recipe.place("nxdi.max_model_len"), what, f"use at most {recipe.shapes.kv[-1]}")


def _draft_problems(plan: Plan) -> Iterator[Problem]:
    recipe, pair = plan.recipe, plan.pair
    place = recipe.place
    if pair.target.family not in CLASSES:
        what = f"the target is of family {pair.target.family}; Tandem knows NxD Inference's {', '.join(CLASSES)}"
        yield Problem(place("target.source"), what, "use a target of these families, or the neuron backend")
    if pair.draft.family not in CLASSES:
        what = f"the draft is of family {pair.draft.family}; NxD Inference needs two complete models"
        yield Problem(place("draft.source"), what, "use a smaller model as draft, or the neuron backend")
        return
    if pair.draft.draft_vocab is not None or pair.draft.shares_embedding:
        what = "the draft has a reduced vocabulary or no embedding; NxD Inference needs a complete model"
        yield Problem(place("draft"), what, "use a draft with its own embedding and the target's vocabulary")
    if recipe.draft.derive is not None:
        yield Problem(
            place("draft.derive"),
            "NxD Inference reads the draft from a checkpoint",
            "save the layers as a checkpoint and use that as draft.source",
        )
    if pair.models.tp_of("draft") != pair.models.tp and pair.draft.family not in OWN_TP_FAMILIES:
        what = f"a {pair.draft.family} draft needs as many ranks as its target in NxD Inference"
        yield Problem(place("draft.placement"), what, "write placement: sharded")
    if pair.models.target_dtype != pair.models.draft_dtype:
        what = f"found {pair.models.draft_dtype}, the target has {pair.models.target_dtype}"
        yield Problem(place("draft.dtype"), what, "use the target's dtype")


def _classes(family: str) -> tuple[str, str]:
    module, name = CLASSES[family]
    return module, f"Neuron{name}ForCausalLM"


def _vllm(plan: Plan, k: int) -> dict[str, Any]:
    """Return environment and arguments of `vllm serve`.

    NxDI does not check the last positions of a cache, so `max-model-len` excludes them unless a recipe has its own.
    """
    shapes, own = plan.recipe.shapes, plan.recipe.nxdi or Nxdi()
    framework = {"NEURON_COMPILED_ARTIFACTS": ".", "VLLM_NEURON_FRAMEWORK": "neuronx-distributed-inference"}
    return {
        "environment": {**own.environment, **framework},
        "arguments": {
            "model": MODEL_FOLDERS["target"],
            "tensor-parallel-size": plan.pair.models.tp,
            "max-num-seqs": shapes.batch[-1],
            "max-model-len": own.max_model_len or shapes.kv[-1] - (k + 1),
            "speculative-config": {"model": MODEL_FOLDERS["draft"], "num_speculative_tokens": k + 1},
        },
    }
