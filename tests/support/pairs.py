"""Small random pairs that run eagerly, and a reference generation that uses no cache and no speculation."""

from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.graphs.module import run_phase
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
from pipeline.models.caches import empty_caches
from pipeline.models.families import config_of
from pipeline.models.parallel import Seams
from pipeline.models.weights import EMBEDDING, weight_specs

SMALL = {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@dataclass
class Pair:
    """Weights and state of a pair by signature name; `step` runs one phase eagerly."""

    shape: PairSpec
    tensors: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def step(self, spec: GraphSpec, **arguments):
        """Run a phase; arguments are lists or tensors."""
        given = {k: torch.as_tensor(v) for k, v in arguments.items()}
        given = {k: v.int() if v.dtype == torch.int64 else v for k, v in given.items()}
        with torch.no_grad():
            return run_phase(spec, self.shape, {**self.tensors, **self.state, **given}, lambda tp: Seams())

    def logits(self, model: str, tokens: list[int]) -> torch.Tensor:
        """Logits [T, V] of a whole sequence from an empty cache that nobody else sees."""
        alone = Pair(self.shape, self.tensors, empty_state(self.shape))
        spec = GraphSpec("score", 1, len(tokens), self.shape.length, model=model)
        return alone.step(spec, tokens=[tokens], position=[0], lengths=[len(tokens)])[0][0]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Plain greedy generation, recomputed from scratch for every token."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits("target", tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def prefill(self, prompts: list[list[int]], how: str = "greedy", **sampling):
        """Prefill prompts into rows 0.. and return each row's first token."""
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        spec = GraphSpec("prefill", len(prompts), longest, longest, sampling=how)
        lengths = [len(prompt) for prompt in prompts]
        return self.step(spec, tokens=tokens, lengths=lengths, slots=list(range(len(prompts))), **sampling)[0]


def seeds(rows: int, turn: int) -> torch.Tensor:
    """Seeds that no other turn has: int32 [rows, 2]."""
    return torch.stack((torch.arange(rows), torch.full((rows,), turn)), dim=1).int()


def empty_state(shape: PairSpec) -> dict[str, torch.Tensor]:
    """Zeroed caches of both models."""
    kind, state = shape.models.draft_kind, {}
    if not kind.reads_target_states:
        state = {"draft/tail": torch.zeros(shape.rows, dtype=torch.int32)}
    if kind.keeps_features:
        state = {"draft/feature": torch.zeros(shape.rows, shape.draft.hidden)}
    for model in ("target", "draft"):
        config = shape.models.config_of(model)
        own = empty_caches(config, shape.rows, shape.length, torch.float32, replayed=shape.replayed)
        for layer in range(config.layers):
            for name in {f"k.{layer}", f"v.{layer}"} & set(own):  # of a window
                own[name] = own[name][:, :, : shape.cache_length(model, layer)].clone()
        state |= {f"{model}/{name}": tensor for name, tensor in own.items()}
    return state


def make_pair(
    agreement: str = "some",
    rows: int = 4,
    length: int = 40,
    candidates: int | None = None,
    vocab: tuple[int, int] | None = None,
    family: dict[str, Any] | None = None,
    replayed: int = 0,
) -> Pair:
    """A random pair. `agreement`: the draft is the target (`all`), its first layers (`some`), its negative (`none`).

    `vocab`: sizes of the target's and the draft's vocabulary; the draft then has an embedding and a head of its own.
    `family`: other fields of the config, with the fields of the draft of `some` as `draft`.
    """
    torch.manual_seed(0)
    if vocab is not None:
        return _padded_pair(*vocab, rows, length, candidates)
    fields = SMALL | (family or {})
    smaller = {} if agreement == "all" else fields.pop("draft", {"num_hidden_layers": 1})
    target = config_of(fields, "target")
    draft = config_of(fields | smaller | {"shares_embedding": True}, "draft")
    models = ModelsSpec(target, draft, "float32", "float32", 1, True)
    shape = PairSpec(models, rows, length, candidates, replayed=replayed)
    weights = {}
    for spec in weight_specs(target):
        scale = 0.3 if spec.kind != "vector" else 0.1
        weights[spec.name] = torch.randn(spec.shape) * scale + (spec.kind == "vector")
        if ".layers.0." not in spec.name and spec.name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[spec.name] *= 0.3
    tensors = {f"target/{name}": tensor for name, tensor in weights.items()}
    for spec in weight_specs(draft):
        if spec.name != EMBEDDING:
            tensors[f"draft/{spec.name}"] = weights[spec.name].clone()
    if agreement == "none":
        tensors["draft/model.norm.weight"] = -tensors["draft/model.norm.weight"]
    return Pair(shape, tensors, empty_state(shape))


def _padded_pair(vocab: int, draft_vocab: int, rows: int, length: int, candidates: int | None) -> Pair:
    configs = {
        "target": config_of(SMALL | {"vocab_size": vocab, "tie_word_embeddings": False}, "target"),
        "draft": config_of(
            SMALL | {"vocab_size": draft_vocab, "tie_word_embeddings": False, "num_hidden_layers": 1}, "draft"
        ),
    }
    models = ModelsSpec(configs["target"], configs["draft"], "float32", "float32", 1, True)
    shape = PairSpec(models, rows, length, candidates)
    tensors: dict[str, torch.Tensor] = {}
    for model, config in configs.items():
        for spec in weight_specs(config):
            values = torch.randn(spec.shape) * (0.3 if spec.kind != "vector" else 0.1) + (spec.kind == "vector")
            known = tensors.get(f"target/{spec.name}")
            if model == "draft" and known is not None:
                count = min(len(values), len(known))
                values[:count] = known[:count]
            tensors[f"{model}/{spec.name}"] = values
        tensors[f"{model}/rank.vocab_offset"] = torch.zeros(1, dtype=torch.int32)
    return Pair(shape, tensors, empty_state(shape))
