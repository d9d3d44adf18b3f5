"""Pairs that nobody tuned for: every family, tokenizer form and padding, token by token against transformers.

The fast tests run the graphs eagerly on shards that the sharder wrote; the slow ones build and load artifacts.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from pipeline import runtime
from pipeline.artifact.manifest import GraphEntry, PairManifest
from pipeline.cache.local import Cache
from pipeline.errors import SourceError
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import run_phase
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import Signature, signature
from pipeline.graphs.spec import GraphSpec
from pipeline.models.parallel import Seams
from pipeline.plan.plan import Plan, make_plan
from pipeline.progress import no_log
from pipeline.recipe import Recipe, load
from pipeline.runtime.engine import Engine
from pipeline.runtime.text import Text
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.stages.shard_files import write_shards
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support import families
from support.eager import make_engine

NEW_TOKENS = 16


@dataclass
class EagerRanks:
    """The graphs of a plan without a compiler, on the shards in `root`."""

    plan: Plan
    root: Path

    def __post_init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.weights = {
            f"{model}/{name}": tensor
            for model in ("target", "draft")
            for name, tensor in load_file(self.root / f"weights/{model}/rank-0-of-1.safetensors").items()
        }

    def run(self, spec: GraphSpec, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        io: Signature = signature(spec, self.plan.pair, PlainPacking())
        for t in io.state:
            self.state.setdefault(t.name, torch.zeros(t.shape, dtype=torch_dtype(t.dtype)))
        named = {t.name: self.weights.get(t.name, self.state.get(t.name)) for t in io.weights + io.state} | arguments
        with torch.no_grad():
            outputs = run_phase(spec, self.plan.pair, named, lambda _: Seams())
        return {t.name: out for t, out in zip(io.outputs, outputs, strict=True)}

    def reset(self) -> None:
        self.state.clear()

    def close(self) -> None:
        pass


def write_recipe(family: str, root: Path, dtype: str = "float32", spec: families.Family | None = None) -> Path:
    recipe = {
        "name": family,
        "target": {"source": "./target", "dtype": dtype},
        "draft": families.write_pair(spec or families.FAMILIES[family], root),
        "speculation": {"draft_tokens": [3], "sampling": ["greedy", "stochastic"]},
        "shapes": {"batch": [1, 3], "prefill": [48], "kv": [64]},
        "validate": {"max_new_tokens": 8},
    }
    (root / f"{family}.yaml").write_text(yaml.safe_dump(recipe))
    return root / f"{family}.yaml"


def fewer_graphs(recipe: Path) -> Path:
    """The same recipe with five graphs to compile."""
    data = yaml.safe_load(recipe.read_text())
    data["shapes"]["batch"], data["speculation"]["sampling"] = [3], ["greedy"]
    recipe.write_text(yaml.safe_dump(data))
    return recipe


@pytest.fixture(scope="module", params=families.FAMILIES)
def pair(request, tmp_path_factory) -> tuple[str, Path, Recipe, Engine]:
    """A family, its folder, its recipe, and an engine over its eager graphs."""
    root = tmp_path_factory.mktemp(request.param)
    recipe = load(write_recipe(request.param, root))
    target, draft = resolve_pair(recipe, base=root, cache=root / "cache")
    plan = make_plan(recipe, target.config, draft.config)
    write_shards(plan.pair.models, target, draft, root / "shards", packing=PlainPacking())
    (root / "tokenizer").mkdir()
    for name, data in tokenizer_files(target).items():
        (root / "tokenizer" / name).write_bytes(data)
    manifest = PairManifest.model_construct(
        pair=plan.pair,
        graphs=tuple(GraphEntry(spec=spec, key="-", file="-", io="-") for spec in plan.graphs),
        step_costs=None,
        lookup=None,
    )
    return request.param, root, recipe, Engine(manifest, EagerRanks(plan, root / "shards"), Text(root / "tokenizer"))


def check_greedy(root: Path, prompts: list[list[int]], answers: list[list[int]], *, near_ties: bool = False) -> None:
    """Each token is transformers' choice in float32 after those before it, and answers end as the checkpoint says.

    What `generate` of transformers says with a pass for each token takes one for each answer. With `near_ties`, as
    kernels of bfloat16 round differently, a token may be nearly the best.
    """
    options = {"dtype": torch.float32, "attn_implementation": "eager"}  # another one of 4.57 has no caps on scores
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "target", **options)
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        gaps = logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        allowed = 2**-5 * logits.abs().amax(-1) if near_ties else 0
        assert bool((gaps <= allowed).all()), gaps
        assert not stops & set(answer[:-1])
        assert len(answer) == NEW_TOKENS or answer[-1] in stops


def test_greedy_tokens_equal_transformers(pair):
    """More prompts than rows, with and without speculation."""
    _, root, _, engine = pair
    prompts = [engine.text.encode(text) for text in families.PROMPTS]
    plain = [a.tokens for a in engine.generate(prompts, max_new_tokens=NEW_TOKENS, speculate=False)]
    check_greedy(root, prompts, plain)
    answers = engine.generate(prompts, max_new_tokens=NEW_TOKENS)
    assert [a.tokens for a in answers] == plain
    assert sum(a.accepted for a in answers) > 0, "no draft token was ever accepted: nothing is tested"
    assert sum(a.accepted for a in answers) < 3 * sum(a.steps for a in answers)


def test_stochastic_tokens_are_ids_of_the_target(pair):
    """With tokens beyond the smaller vocabulary among the draws, where there is one."""
    _, _, _, engine = pair
    vocab = engine.ranks.plan.pair.target.vocab
    smaller = min(vocab, engine.ranks.plan.pair.draft.vocab)
    prompts = [engine.text.encode(text) for text in families.PROMPTS] * (1 if smaller == vocab else 3)
    answers = engine.generate(prompts, max_new_tokens=6 if smaller == vocab else NEW_TOKENS, temperature=3.0)
    tokens = {token for answer in answers for token in answer.tokens}
    assert max(tokens) < vocab
    assert smaller == vocab or any(token >= smaller for token in tokens)


def test_text_is_what_transformers_makes_of_it(pair):
    """Ids, chat templates and decoding, whatever form the checkpoint's tokenizer has."""
    family, root, _, engine = pair
    reference = transformers.AutoTokenizer.from_pretrained(root / "target")
    for text in (*families.PROMPTS, "<|im_start|>user\nhi<|im_end|>"):
        assert engine.text.encode(text) == reference(text).input_ids
        assert engine.text.decode(reference(text).input_ids) == reference.decode(
            reference(text).input_ids, skip_special_tokens=True
        )
    assert engine.text.has_chat == (families.FAMILIES[family].tokenizer not in ("json", "sentencepiece"))
    if engine.text.has_chat:
        messages = [{"role": "user", "content": "  hello "}]
        wanted = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert engine.text.chat("  hello ") == list(wanted)


def test_speculation_with_another_vocabulary_draws_from_the_targets_distribution():
    """Rows of one step, drawn many times: first tokens follow the target's softmax, chi-square at one in 10,000."""
    from scipy import stats

    from support.pairs import make_pair, seeds

    pair = make_pair(vocab=(61, 55), rows=16)
    prompt, rows, draws = [5, 9, 23, 7], 16, 120
    pair.prefill([prompt[:-1]] * rows)
    logits = pair.logits("target", prompt)[-1]
    spec = GraphSpec("speculate", rows, 3, pair.shape.length, 2, sampling="stochastic")
    counts = torch.zeros(61)
    state = {name: tensor.clone() for name, tensor in pair.state.items()}
    for turn in range(draws):
        pair.state = {name: tensor.clone() for name, tensor in state.items()}
        out = pair.step(
            spec, last_token=[prompt[-1]] * rows, position=[3] * rows, active=[True] * rows,
            temperature=torch.full((rows,), 1.5), top_k=[0] * rows, top_p=torch.ones(rows),
            seed=seeds(rows, turn),
        )  # fmt: skip
        counts += torch.bincount(out[0][:, 0].long(), minlength=61)
    wanted = torch.softmax(logits.double() / 1.5, 0) * rows * draws
    rare = wanted < 5
    found = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    assert counts[55:].sum() > 0
    test = stats.chisquare(found, torch.cat((wanted[~rare], wanted[rare].sum()[None])))
    assert test.pvalue > 1e-4, test


@pytest.mark.parametrize("draft_vocab", [55, 70])
def test_ids_that_one_model_lacks_are_never_proposed(draft_vocab):
    """Even if the draft likes nothing else: its highest rows get a head that beats all others."""
    from support.pairs import make_pair, seeds

    pair = make_pair(vocab=(61, draft_vocab))
    head = pair.tensors["draft/lm_head.weight"]
    head[min(61, draft_vocab) :] = 50 * head[:1]
    pair.prefill([[5, 60, 7]] * 4)
    common = {"last_token": [60] * 4, "position": [3] * 4, "active": [True] * 4}
    tokens, count = pair.step(GraphSpec("speculate", 4, 3, pair.shape.length, 2), **common)
    assert (tokens[:, 0] == pair.logits("target", [5, 60, 7, 60])[-1].argmax()).all()
    assert tokens.max() < 61
    sampling = {"temperature": torch.full((4,), 5.0), "top_k": [0] * 4, "top_p": torch.ones(4)}
    spec = GraphSpec("speculate", 4, 3, pair.shape.length, 2, sampling="stochastic")
    for seed in range(20):
        tokens, count = pair.step(spec, **common, **sampling, seed=seeds(4, seed))
        assert tokens.max() < 61
        assert (count >= 1).all()


def test_pair_whose_tokenizer_exceeds_a_vocabulary_is_refused(tmp_path):
    small = replace(families.FAMILIES["qwen2"], draft={"vocab_size": 300, "num_hidden_layers": 1})
    recipe = load(write_recipe("qwen2", tmp_path, spec=small))
    with pytest.raises(SourceError, match="vocab_size=300, but the target has 416; tokenizer ids: 341"):
        resolve_pair(recipe, base=tmp_path, cache=tmp_path / "cache")


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        "gemma2",
        "glm4",
        "granite-moe",
        "granite4-nope",
        "phi4-mini",
        "qwen2-moe",
        "qwen3-next",
        "qwen3.5-moe",
    )
]


BEYOND_LLAMA = [
    "gemma3", "gemma4", "gemma4-experts", "gemma4-small", "gpt-oss", "llama4", "olmo3", "qwen3-moe", "qwen3.5",
]  # fmt: skip


@pytest.mark.parametrize("family", [*BEYOND_LLAMA, *SLOW])
def test_gates_pass_of_mechanisms_beyond_llama(family, tmp_path):
    """Layer by layer references of transformers, windows, experts and scales included, agree with the graphs."""
    recipe = load(fewer_graphs(write_recipe(family, tmp_path)))
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "cache")
    prompts = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(families.PROMPTS[:3])]
    store = Cache(tmp_path / "goldens", "goldens")
    run = run_gates(GateInputs(make_engine(recipe, pair), recipe, prompts, pair, store, no_log))
    assert run.passed, run.findings


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "granite4", "qwen2-moe", "qwen3-moe"])
def test_small_build_equals_transformers(family, tmp_path):
    """Windows, two rotary embeddings, caps, GeGLU; experts: from the command line to tokens."""
    assert_build_equals_transformers(family, "float32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_build_equals_transformers(family, dtype, tmp_path):
    """From the command line, in another folder than the recipe's, with the default prompts."""
    if dtype == "bfloat16" and family not in ("llama", "qwen2"):
        pytest.skip("two families are enough in bfloat16")
    assert_build_equals_transformers(family, dtype, tmp_path)


def assert_build_equals_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    recipe = fewer_graphs(write_recipe(family, tmp_path / "recipe", dtype))
    (tmp_path / "elsewhere").mkdir()
    tandem = [
        sys.executable,
        "-c",
        "from pipeline.cli.main import main; main()",
        "build",
        str(recipe),
        "--out",
        "made",
        "--no-validate",
    ]
    subprocess.run(tandem, cwd=tmp_path / "elsewhere", check=True)
    engine = runtime.load(tmp_path / "elsewhere" / "made")
    prompts = [engine.text.encode(text) for text in families.PROMPTS]
    plain = [a.tokens for a in engine.generate(prompts, max_new_tokens=NEW_TOKENS, speculate=False)]
    speculative = [a.tokens for a in engine.generate(prompts, max_new_tokens=NEW_TOKENS)]
    for answers in (plain, speculative):
        check_greedy(tmp_path / "recipe", prompts, answers, near_ties=dtype != "float32")
