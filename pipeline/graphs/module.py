"""Turn a GraphSpec into a module of flat tensors that a backend can trace: one class for all phases and backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.signature import SHAPING, Signature, TensorSpec
from pipeline.graphs.spec import ROLES, GraphSpec, PairSpec, Role
from pipeline.models.parallel import CACHES, Seams, State
from pipeline.models.weights import BASE, EMBEDDING
from pipeline.speculation import phases
from pipeline.speculation.drafters import FEATURE, TAIL, Scores, drafter_of, index_range, score
from pipeline.speculation.model import Choose, Model, Prompt, Rows
from pipeline.speculation.sampling import Sampling
from pipeline.speculation.shaping import Shaping

SeamsFor = Callable[[int], Seams]
"""Returns the seams of a model split over a number of ranks."""


class GraphModule(nn.Module):
    """A graph over one flat list of tensors in the order of its signature.

    Holds no tensors: weights, state and arguments are all inputs, so that graphs share them without a copy.
    """

    def __init__(self, spec: GraphSpec, pair: PairSpec, io: Signature, seams_for: SeamsFor) -> None:
        super().__init__()
        self.spec, self.pair, self.io, self.seams_for = spec, pair, io, seams_for

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the phase; return the signature's outputs and update the state tensors in place."""
        by_name = {spec.name: tensor for spec, tensor in zip(self.io.inputs, tensors, strict=True)}
        return run_phase(self.spec, self.pair, by_name, self.seams_for)


def run_phase(spec: GraphSpec, pair: PairSpec, tensors: dict[str, Tensor], seams_for: SeamsFor) -> tuple[Tensor, ...]:
    """Run one phase on tensors by name. State entries of `tensors` are updated, in place or by replacement."""
    models = {role: _model(role, pair, tensors, seams_for) for role in ROLES}
    outputs = _outputs(spec, pair, tensors, models)
    for role, model in models.items():
        tensors.update({f"{role}/{key}": tensor for key, tensor in model.state.items()})
    return outputs


def _outputs(
    spec: GraphSpec, pair: PairSpec, tensors: dict[str, Tensor], models: Mapping[Role, Model]
) -> tuple[Tensor, ...]:
    target, drafter = models["target"], drafter_of(models["draft"])
    if spec.phase == "score":
        inputs = (tensors["tokens"], tensors["position"], spec.kv, tensors.get("lengths"))
        return _scored(drafter.score(target, *inputs) if spec.model == "draft" else _target_scores(target, *inputs))
    choose = _choose(spec, pair, tensors)
    if spec.phase == "prefill":
        return (phases.prefill(target, drafter, _prompt(spec, tensors), choose),)
    rows = Rows(tensors["last_token"], tensors["position"], tensors["active"], spec.kv)
    if spec.phase == "decode":
        return (phases.decode(target, drafter, rows, choose),)
    if spec.phase == "propose":
        return (phases.propose(drafter, rows, spec.draft_tokens, choose),)
    if spec.phase == "verify":
        tokens, count, logprobs = phases.verify(target, drafter, rows, tensors["drafts"], choose)
        return (tokens, count, *logprobs)
    return phases.speculate(target, drafter, rows, spec.draft_tokens, choose)


def _target_scores(
    target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int, lengths_B: Tensor | None
) -> Scores:  # fmt: skip
    logits_BTV, hidden = score(target, tokens_BT, position_B, kv, lengths_B)
    return Scores(logits_BTV, hidden.experts_BTLC)


def _scored(scores: Scores) -> tuple[Tensor, ...]:
    return tuple(output for output in scores if output is not None)


def _prompt(spec: GraphSpec, tensors: Mapping[str, Tensor]) -> Prompt:
    """Return the prompts of a prefill graph, or the next chunks of prompts."""
    tokens_BT = tensors["tokens"]
    positions_BT = index_range(spec.tokens, tokens_BT).expand_as(tokens_BT)
    if spec.continues:
        positions_BT = positions_BT + tensors["position"][:, None]
    kv = spec.kv if spec.continues else 0
    return Prompt(tokens_BT, positions_BT, tensors["lengths"], tensors["slots"], kv)


def empty(specs: tuple[TensorSpec, ...], device: str = "cpu") -> list[Tensor]:
    """Return uninitialised tensors of a signature, which take no memory until they are written."""
    return [torch.empty(t.shape, dtype=torch_dtype(t.dtype), device=device) for t in specs]


def _model(role: Role, pair: PairSpec, tensors: Mapping[str, Tensor], seams_for: SeamsFor) -> Model:
    own = {key.removeprefix(f"{role}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{role}/")}
    caches = tuple(f"{name}." for name in CACHES)
    state: State = {key: t for key, t in own.items() if key in (TAIL, FEATURE, BASE) or key.startswith(caches)}
    weights = {key: t for key, t in own.items() if key not in state}
    if role == "draft" and pair.models.embedding_is_shared and f"target/{EMBEDDING}" in tensors:
        weights[EMBEDDING] = tensors[f"target/{EMBEDDING}"]
    partner = pair.target.vocab if role == "draft" and pair.draft.vocab != pair.target.vocab else None
    taps = pair.models.taps if role == "target" else ()
    seams = seams_for(pair.models.tp_of(role))
    return Model(pair.models.config_of(role), weights, state, seams, partner, taps, pair.length)


def _choose(spec: GraphSpec, pair: PairSpec, tensors: dict[str, Tensor]) -> Choose:
    copied = tensors.get("copied")
    if spec.sampling == "greedy":
        return Choose(copied=copied)
    sampling = Sampling(tensors["temperature"], tensors["top_k"], tensors["top_p"], tensors["seed"])
    if spec.phase != "verify":
        return Choose(sampling, pair.candidates, copied)
    shaping = Shaping(*(tensors[name] for name in SHAPING))
    return Choose(sampling, pair.candidates, copied, shaping, spec.logprobs)
