"""An EAGLE-3 head as the draft: the same contracts as a draft model, through the eager engine and the gates."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cache.local import Cache
from pipeline.errors import RecipeError, SourceError
from pipeline.models.eagle3 import taps_of
from pipeline.models.families import config_of
from pipeline.plan.plan import make_plan
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support.eager import RAGGED, emitted, make_engine
from support.reports import PROMPTS

HEAD = "pico://llama?draft_vocab=128&eagle3=1"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("eagle3")


SAMPLED = ("greedy", "stochastic")


def recipe_of(
    dtype: str = "float32", draft: str = HEAD, method: str = "eagle3", steps=(1, 2, 4, 7), kv=(32, 64), sampling=SAMPLED
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "head",
            "target": {"source": "pico://llama", "dtype": dtype},
            "draft": {"source": draft},
            "speculation": {"method": method, "draft_tokens": steps, "sampling": sampling},
            "shapes": {"batch": (1, 4), "prefill": (16, 32), "kv": kv},
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


def pair_of(work, recipe: Recipe):
    return resolve_pair(recipe, base=work, cache=work / "sources")


@pytest.mark.parametrize(
    ("dtype", "steps", "kv", "sampling"),
    [
        pytest.param("float32", (1, 7), (64,), ("greedy",), marks=pytest.mark.slow),
        ("float32", (4,), (32,), SAMPLED),
        pytest.param("bfloat16", (2,), (32, 64), ("greedy",), marks=pytest.mark.slow),
    ],
)
def test_gates_pass(work, dtype, steps, kv, sampling):
    """Parity of target and head with their references, losslessness for every K and bucket, exact sampling."""
    recipe = recipe_of(dtype, steps=steps, kv=kv, sampling=sampling)
    pair = pair_of(work, recipe)
    chosen = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(PROMPTS)]
    run = run_gates(
        GateInputs(make_engine(recipe, pair), recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log)
    )
    assert run.passed, run.findings
    assert run.parity.section.models["draft"].layers, "the head's keys and values were compared"


@pytest.mark.parametrize("name", ["fc.weight", "midlayer.self_attn.k_proj.weight", "midlayer.hidden_norm.weight"])
def test_parity_sees_a_wrong_head(work, name, tmp_path):
    """A head whose graphs run other weights than its checkpoint's."""
    recipe = recipe_of(steps=(2,), kv=(32,), sampling=("greedy",))
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    key = f"draft/{name.replace('midlayer', 'model.layers.0')}"
    engine.ranks.tensors[key] = engine.ranks.tensors[key] * 1.03
    chosen = [Prompt("p0", "chat", PROMPTS[0])]
    run = run_gates(GateInputs(engine, recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log))
    assert any(failure.startswith("draft:") for failure in run.findings["parity"])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_speculation_equals_plain_decode(work, steps, rows):
    engine = make_engine(recipe_of(), pair_of(work, recipe_of()))
    assert emitted(engine, RAGGED[:rows], 50, draft_tokens=steps)
    assert engine.stats()["catch_ups"] == 0


def test_heads_of_both_layouts_are_read(work, tmp_path):
    """`midlayer` and `norm` of SafeAILab's heads, `layers.0` of others, `t2d` ignored."""
    _, draft = pair_of(work, recipe_of())
    tensors = load_file(draft.root / "model.safetensors")
    other = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(other | {"t2d": torch.zeros(512, dtype=torch.bool)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((draft.root / "config.json").read_text())
    _, found = pair_of(work, recipe_of(draft=str(tmp_path)))
    assert found.config == draft.config


def test_default_taps_are_the_conventions():
    target = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 32}, "target")
    head = config_of(HEAD_CONFIG, "head")
    assert taps_of(target, head) == (2, 16, 29)


SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 1,
}  # fmt: skip
HEAD_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 128, **SIZES}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 1]}}, "expected ascending layers"),
    ],
)
def test_config_that_is_no_head_is_refused(change, what):
    with pytest.raises(SourceError, match=what):
        config_of(HEAD_CONFIG | change, "config.json")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_size": 128, "target_hidden_size": 128}, "hidden"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}, r"layers \[0, 1, 9\]"),
    ],
)
def test_head_of_another_target_is_refused(work, tmp_path, change, what):
    _, draft = pair_of(work, recipe_of())
    (tmp_path / "config.json").write_text(json.dumps(draft.config_json | change))
    (tmp_path / "model.safetensors").write_bytes((draft.root / "model.safetensors").read_bytes())
    with pytest.raises(SourceError, match=what):
        pair_of(work, recipe_of(draft=str(tmp_path)))


@pytest.mark.parametrize(("method", "draft"), [("draft_model", HEAD), ("eagle3", "pico://llama?draft_vocab=128")])
def test_method_must_be_the_drafts(work, method, draft):
    recipe = recipe_of(method=method, draft=draft)
    pair = pair_of(work, recipe)
    with pytest.raises(RecipeError, match=r"speculation\.method"):
        make_plan(recipe, pair[0].config, pair[1].config)
