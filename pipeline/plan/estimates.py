"""The costs of a plan: memory of a rank, size of graphs and artifact, time and memory to compile. Pure; no torch.

Weights and caches are counted exactly, from the tables that the sharder and the graphs use. Scratch, compile time and
compile memory are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from pipeline.errors import no_string
from pipeline.graphs.dtypes import DTYPES
from pipeline.graphs.packing import BlockPacking, Packing
from pipeline.graphs.signature import stored_weights
from pipeline.graphs.spec import ROLES, GraphSpec, ModelsSpec, PairSpec, Role
from pipeline.models.blocks import RECURRENT_CHUNK, query_blocks
from pipeline.models.config import Experts, Layer, ModelConfig
from pipeline.models.draft_kind import P_EAGLE
from pipeline.models.rank_slices import local_heads, local_shape

MIB = 1 << 20
GIB = 1 << 30
ESTIMATES = 1
"""Version of the constants in this file: recorded times are compared with estimates of the same version only."""
HEADERS_S = 12.0
"""Time in which the first build on a machine precompiles headers."""


@dataclass(frozen=True)
class CompileCost:
    """Cost of compiling one graph, and its size: a fixed part and a part for each layer pass."""

    fixed_s: float
    pass_s: float
    fixed_memory_bytes: int
    pass_memory_bytes: int
    fixed_size_bytes: int
    pass_size_bytes: int

    def seconds(self, passes: int) -> float:
        """Return the time to compile on one core."""
        return self.fixed_s + self.pass_s * passes

    def memory_bytes(self, passes: int) -> int:
        """Return the host memory for compiling."""
        return self.fixed_memory_bytes + self.pass_memory_bytes * passes

    def size_bytes(self, passes: int) -> int:
        """Return the size of the compiled graph."""
        return self.fixed_size_bytes + self.pass_size_bytes * passes


COMPILE_COSTS = {
    # Measured two at a time on two cores with AVX2, without the 15 s in which the first graphs precompile headers: 29
    # graphs of SmolLM2-135M, which share their subgraphs, 11 s and 0.4 MiB each; 7 graphs of 2 layers, 8 s and 0.3 MiB.
    # Python and the C++ compiler: 0.8 GiB.
    "inductor": CompileCost(7.5, 0.11, 800 * MIB, MIB // 4, 288 << 10, 3400),
    # Graphs of several ranks, and of a GPU, have no subgraphs. SmolLM2-135M, speculate with K=4, 42 passes: 92 s,
    # 1.25 GiB in two processes, 6.2 MB.
    "inductor, whole": CompileCost(15, 2.0, 1000 * MIB, 8 * MIB, MIB // 4, 140 << 10),
    # From public reports of neuronx-cc, not measured: accurate enough to separate minutes from hours.
    "neuron": CompileCost(60, 8.0, 8 * GIB, 128 * MIB, 16 * MIB, MIB),
}


GATES = "gates"
REFERENCE = "reference"
"""Stage of the gates that computes what they compare with; cached for the next build."""
PROMPT_TOKENS = 100
REFERENCE_S, GATES_S = 0.035, 0.085
"""Seconds for each GFLOP of one pass over the scored tokens: 189 s and 330 s for SmolLM2-135M with an EAGLE-3 head, on
two cores with AVX2."""
SHARD_RATE, PACKAGE_RATE = 300e6, 1e9
"""Bytes per second."""
GATES_BYTES = 1200 * MIB


@dataclass(frozen=True)
class Pace:
    """Time on a kind of processor, relative to the constants of this file, which are of one with AVX2."""

    compile: float = 1.0
    reference: float = 1.0
    gates: float = 1.0

    def of_stage(self, name: str) -> float:
        """Return the factor of a stage."""
        return {REFERENCE: self.reference, GATES: self.gates}.get(name, 1.0)


USUAL = Pace()
PACES = {
    # An AMD EPYC of family 25, two cores, quiet, SmolLM2-135M with an EAGLE-3 head: 163 s to compile 41 graphs, 58 s
    # for the reference, 121 s for the gates.
    "avx512_bf16": Pace(compile=0.70, reference=0.43, gates=0.37),
}
"""By the flag that such a processor has in `/proc/cpuinfo`."""


def pace_of(flags: Collection[str]) -> Pace:
    """Return the pace of a processor with these flags."""
    no_string(flags, "flags", "flags")
    return next((pace for flag, pace in PACES.items() if flag in flags), USUAL)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. All but `scratch`, an estimate, are exact."""

    target_weights: int
    draft_weights: int
    target_kv: int
    draft_kv: int
    scratch: int

    @property
    def total(self) -> int:
        """All memory of a rank while it serves."""
        return self.target_weights + self.draft_weights + self.target_kv + self.draft_kv + self.scratch


def rank_memory(pair: PairSpec, packing: Packing, graphs: Iterable[GraphSpec]) -> Memory:
    """Return the memory of one rank."""
    models = pair.models
    return Memory(
        target_weights=weight_bytes(models, "target", packing),
        draft_weights=weight_bytes(models, "draft", packing),
        target_kv=_cache_bytes(pair, "target"),
        draft_kv=_cache_bytes(pair, "draft"),
        scratch=max(scratch_bytes(pair, spec, fused=isinstance(packing, BlockPacking)) for spec in graphs),
    )


def weight_bytes(models: ModelsSpec, role: Role, packing: Packing) -> int:
    """Return the bytes of one rank's shard in the backend's layout, with the vocabulary offset."""
    config, tp = models.config_of(role), models.tp_of(role)
    size = DTYPES["int32"].size_bytes
    for weight in stored_weights(models, role, fused=packing.fuses):
        dtype = models.stored_dtype(role, weight)
        shape = packing.packed_shape(local_shape(weight, config, tp), weight.kind, dtype)
        size += math.prod(shape) * DTYPES[dtype].size_bytes
    return size


@dataclass(frozen=True)
class Work:
    """What the gates run: prompts and new tokens of each; no prompts without gates."""

    prompts: int
    new_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are scored, with prompts of the usual length."""
        return self.prompts * (PROMPT_TOKENS + self.new_tokens)


def stage_seconds(pair: PairSpec, memory: Memory, work: Work) -> dict[str, float]:
    """Return the time of the stages beside compiling; the gates' without and with what is cached (`reference`)."""
    size_bytes = pair.models.tp * (memory.target_weights + memory.draft_weights)
    seconds = {"sources": 4.0, "shard": 0.03 + size_bytes / SHARD_RATE, "package": 0.3 + size_bytes / PACKAGE_RATE}
    if not work.prompts:
        return seconds
    gflop = 2e-9 * work.tokens * sum(map(_parameters, (pair.target, pair.draft)))
    return seconds | {REFERENCE: 0.7 + gflop * REFERENCE_S, GATES: 0.6 + gflop * GATES_S}


def gates_memory_bytes(memory: Memory, work: Work, ranks: int = 1) -> int:
    """Return the host memory of the gates, with Python, torch and transformers, where `ranks` run on one machine."""
    return GATES_BYTES + ranks * memory.total if work.prompts else 0


def reference_memory_bytes(pair: PairSpec, tokens: int) -> int:
    """Return the host memory of the references of some tokens: Python, a layer's weights, and hidden states.

    Weights of a layer are held as read, in the recipe's dtype and in that of the baseline; states in both dtypes.
    """
    layer = max(_layer_parameters(config, kind) for config in (pair.target, pair.draft) for kind in config.kinds)
    return GATES_BYTES + 16 * layer + 24 * tokens * max(pair.target.hidden, pair.draft.hidden)


def _parameters(config: ModelConfig) -> int:
    """Return about the number of a model's parameters that one token uses."""
    layers = sum(_layer_parameters(config, config.layer(index), of_token=True) for index in range(config.layers))
    return 2 * config.vocab * config.hidden + layers


def _layer_parameters(config: ModelConfig, layer: Layer, *, of_token: bool = False) -> int:
    """Return about the number of a layer's parameters; `of_token`: of those that one token uses."""
    of_kind = config.of(layer)
    inner = of_kind.intermediate
    attention = (config.heads + of_kind.kv_heads) * of_kind.head_dim
    if layer.delta_net is not None:
        attention = layer.delta_net.keys + 3 * layer.delta_net.values // 2
    elif config.attention_gate:
        attention += config.heads * of_kind.head_dim // 2
    if layer.experts is not None:
        inner = of_kind.intermediate if config.has_network(layer) else 0
        inner += layer.experts.intermediate * (layer.experts.chosen if of_token else layer.experts.count)
        inner += layer.experts.shared or 0
    if layer.shares_keys:
        attention -= of_kind.kv_heads * of_kind.head_dim
    attention += config.layer_input or 0
    return config.hidden * (2 * attention + 3 * inner)


def layer_passes(pair: PairSpec, spec: GraphSpec) -> int:
    """Return the number of layer passes of a graph.

    A draft that proposes runs each layer K times, a parallel one once. Beside proposing, a P-EAGLE head runs in the
    other phases as well, to write keys and values of accepted tokens and of the last one.
    """
    if spec.phase == "score":
        return pair.draft.layers if spec.model == "draft" else pair.target.layers
    kind = pair.models.draft_kind
    proposing = 1 if kind.parallel else spec.draft_tokens
    if spec.phase == "propose":
        return proposing * pair.draft.layers
    writing = {"speculate": 1, "verify": 2, "decode": 1}.get(spec.phase, 0) if kind == P_EAGLE else 0
    passes = {"speculate": proposing, "prefill": 1}.get(spec.phase, 0) + writing
    return pair.target.layers + passes * pair.draft.layers


def saved_by_rings(pair: PairSpec) -> int:
    """Return the bytes by which whole caches of all layers would be larger on one rank."""
    whole = replace(pair, rings=())
    return sum(_cache_bytes(whole, role) - _cache_bytes(pair, role) for role in ROLES)


def _cache_bytes(pair: PairSpec, role: Role) -> int:
    return sum(_layer_cache_bytes(pair, role, layer) for layer in pair.models.config_of(role).keeping)


def _layer_cache_bytes(pair: PairSpec, role: Role, layer: int) -> int:
    """Return the bytes of a layer's keys and values, or of its recurrent state and the inputs that it keeps."""
    config, size = pair.models.config_of(role), DTYPES[pair.models.dtype_of(role)].size_bytes
    net = config.layer(layer).delta_net
    if net is None:
        positions = pair.cache_length(role, layer)
        return pair.rows * positions * size * 2 * pair.models.kv_heads_of(role, layer) * config.at(layer).head_dim
    own = net.of_rank(pair.models.tp_of(role))
    matrices = 4 * own.value_heads * own.key_dim * own.value_dim
    return pair.rows * (matrices + size * (own.kernel - 1 + pair.replayed) * own.inputs)


def scratch_bytes(pair: PairSpec, spec: GraphSpec, *, fused: bool) -> int:
    """Return what a graph holds at its peak beside weights and caches: in a layer, or as logits, float32.

    `fused`: the kernels of the `inductor` backend on a CPU, which hold no attention scores and one copy of the logits;
    the test of scratch memory measures it. Else attention is written out, with the scores of a block of queries.
    """
    layer = _fused_layer_bytes if fused else _layer_bytes
    scored = spec.tokens if spec.phase in ("score", "speculate", "verify") else 1
    copies = {"greedy": 1 if fused else 2, "stochastic": 1 if fused else 4, "shaped": 3 if fused else 6}[spec.sampling]
    vocab = pair.models.config_of("draft" if spec.model == "draft" else "target").out_vocab
    logits = 4 * spec.batch * scored * vocab * copies
    layers = [layer(pair, spec, role) for role in pair.roles_of(spec)]
    if spec.model == "draft" and pair.draft.draft_kind.blocks:
        layers.append(layer(pair, replace(spec, tokens=2 * spec.tokens), "draft") + _pairs_bytes(pair, spec))
    return max(*layers, logits) if fused else max(layers) + logits


def _pairs_bytes(pair: PairSpec, spec: GraphSpec) -> int:
    """Return what the blocks of two positions hold in a `score` graph of a DFlash or DSpark draft.

    These are keys and values, copied beside their own, and the float32 bias: once, for heads of one KV head, and its
    negation where causal layers have another.
    """
    draft, size = pair.draft, DTYPES[pair.models.draft_dtype].size_bytes
    slots, keys = 2 * spec.tokens, spec.kv + 2 * spec.tokens
    biases = slots * keys * (4 * 2 + (4 + size) * draft.heads // draft.kv_heads)
    return spec.batch * (biases + 2 * size * draft.kv_heads * keys * draft.head_dim)


def _fused_layer_bytes(pair: PairSpec, spec: GraphSpec, role: Role) -> int:
    """Return what one layer holds at its peak: in attention, or in the feed-forward network.

    Its caller holds the residual before it, normalised too, and the tapped states. Beside these are, in the model's
    dtype, heads, inner values and the residual after each half, and in float32 the results of products.
    """
    config, tp = pair.models.config_of(role), pair.models.tp_of(role)
    size = DTYPES[pair.models.dtype_of(role)].size_bytes
    hidden = config.hidden
    states = hidden * (2 + (len(pair.models.taps) if role == "target" else 0))
    heads, qkv = max(_head_values(config.of(kind), tp) for kind in config.kinds)
    attention = size * (states + 2 * qkv) + 4 * (qkv + heads + hidden)
    experts = [kind.experts for kind in config.kinds if kind.experts is not None]
    sizes = [max(one.chosen * one.intermediate, one.shared or 0) for one in experts]
    sizes += [config.of(kind).intermediate for kind in config.kinds if config.has_network(kind)]
    inner = max(sizes) // (1 if any(one.by_rank for one in experts) else tp)
    chosen = max((one.chosen for one in experts), default=0)  # each token once for each of its experts, and results
    feed_forward = size * (states + 4 * hidden + inner) + 4 * hidden * (2 + 2 * chosen)
    return max(spec.batch * spec.tokens * max(attention, feed_forward), _recurrence_bytes(pair, spec, role))


def _recurrence_bytes(pair: PairSpec, spec: GraphSpec, role: Role) -> int:
    """Estimate what a recurrent layer holds at its peak; 0 without one.

    The states before and after, and in float32 about five values for each key and seven for each other token of a
    chunk, by the test of scratch memory. Replayed tokens take part, and fill up the last chunk.
    """
    net = pair.models.config_of(role).delta_net
    if net is None:
        return 0
    own, size = net.of_rank(pair.models.tp_of(role)), DTYPES[pair.models.dtype_of(role)].size_bytes
    tokens = pair.replayed + spec.tokens
    chunk = min(RECURRENT_CHUNK, tokens)
    padded = -(-tokens // chunk) * chunk
    heads = own.value_heads * (8 * own.key_dim * own.value_dim + 4 * padded * (5 * own.key_dim + 7 * chunk))
    return spec.batch * (heads + size * spec.tokens * 2 * (pair.models.config_of(role).hidden + own.inputs))


def _head_values(config: ModelConfig, tp: int) -> tuple[int, int]:
    """Return the values of a token in a rank's query heads, and in all of its heads."""
    queries = local_heads(config, tp) * config.head_dim
    return queries, queries + 2 * max(config.kv_heads // tp, 1) * config.head_dim


def _layer_bytes(pair: PairSpec, spec: GraphSpec, role: Role) -> int:
    """Estimate one layer's activations in float32, with the scores of one block of queries and their softmax."""
    config, tp = pair.models.config_of(role), pair.models.tp_of(role)
    rows, heads = spec.batch * spec.tokens, max(local_heads(config.of(kind), tp) for kind in config.kinds)
    keys = spec.kv
    block = max(last - first for first, last in query_blocks(spec.batch * heads, spec.tokens, keys))
    heads_wide = max(_head_values(config.of(kind), tp)[0] for kind in config.kinds)
    wide = 4 * config.hidden + 3 * heads_wide + 2 * max(config.of(kind).intermediate for kind in config.kinds) // tp
    passes = {rows}
    if role == "draft" and spec.phase in ("speculate", "propose"):  # which proposes from one or two tokens of a row
        passes.add(2 * spec.batch)
    experts = [kind.experts for kind in config.kinds if kind.experts]
    mixtures = [_mixture_values(one, config.hidden, some, tp) for one in experts for some in passes]
    attention = 4 * (rows * wide + 2 * spec.batch * heads * block * keys + max(mixtures, default=0))
    return max(attention, _recurrence_bytes(pair, spec, role))


def _mixture_values(experts: Experts, hidden: int, rows: int, tp: int) -> int:
    """Estimate the values that experts hold where they are written out, as `Seams.experts` does."""
    inner, count = experts.intermediate // tp, experts.count
    if experts.by_rank:
        inner, count = experts.intermediate, experts.count // tp
    if rows * experts.chosen <= count:  # matrices of the chosen experts, gathered
        return rows * experts.chosen * 3 * inner * hidden
    if rows > inner:  # inner values, in the order of the one product as well
        return count * rows * 4 * inner
    return count * rows * (3 * inner + 2 * hidden)
