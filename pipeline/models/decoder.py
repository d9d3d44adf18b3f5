"""The decoder of every supported family: RMSNorm, rotary attention over a KV cache, gated feed-forward. Pure functions.

A `ModelConfig` says what a family's layers have; no function here asks for the family.

Contains no phases and no sampling. `Seams` defines how weights are stored and reduced.

Shapes: B rows, T tokens, S keys attended over, H hidden, N query heads, G KV heads, D head size, V vocabulary;
heads and vocabulary are this rank's share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models import delta_net
from pipeline.models.activations import activated
from pipeline.models.config import DeltaNet, Layer, ModelConfig
from pipeline.models.layer_inputs import layer_inputs, with_input
from pipeline.models.norms import norm, norm_scaled, normalised, rms_norm
from pipeline.models.parallel import Attend, Gating, Pass, Seams
from pipeline.models.rank_slices import local_heads
from pipeline.models.rotary import Rotary, rotary_of, rotate
from pipeline.models.routing import mixed, of_rank, routed, router_input, shared_out
from pipeline.models.shared_keys import over_caches
from pipeline.models.vocabulary import embed, vocab_rows
from pipeline.models.weights import BASE, NORM, OFFSET, fused_name

Weights = Mapping[str, Tensor]
SHARED, SHARED_GATE = "mlp.shared_expert", "mlp.shared_expert_gate.weight"
NEXT_NORM = "next_norm.weight"
"""Name, among a layer's weights, of the norm after it."""

RANK = "rank"
"""Name, among a layer's weights, of the number of this rank: int [1]."""


class Hidden(NamedTuple):
    """Hidden states of one pass: `last_BTH` after the last norm, `taps_BTX` inputs of tapped layers concatenated.

    `experts_BTLC` int32 are the experts that the router of each layer with experts chose; None without such layers.
    """

    last_BTH: Tensor
    taps_BTX: Tensor | None = None
    experts_BTLC: Tensor | None = None


class Stream(NamedTuple):
    """The residual stream before a layer, and the same after the layer's norm.

    After a layer with experts, `experts_BTC` int32 are those that its router chose.
    """

    x_BTH: Tensor
    normed_BTH: Tensor
    experts_BTC: Tensor | None = None


def hidden_states(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, run: Pass, taps: tuple[int, ...] = ()
) -> Hidden:
    """Run all layers and write keys and values into the caches of `run`.

    `taps` lists layers whose input is returned too, for a draft that reads the target's hidden states; the number of
    layers means the output of the last one.
    Shapes: tokens_BT int32 or int64 [B, T].
    """
    assert run.attend is not None
    if not any(kind.experts is not None and kind.experts.bias for kind in config.kinds):  # added after the sum
        seams = seams.of_pass(tokens_BT.shape[1])
    seams = seams.of_live(run.live_BT)
    x = embed(config, weights, seams, tokens_BT)
    inputs_BTLP = layer_inputs(config, weights, seams, tokens_BT, x) if config.layer_input else None
    rotaries = [rotary_of(config, run.positions_BT, x.dtype, kind) for kind in range(len(config.kinds))]
    of_kinds = [config.of(kind) for kind in config.kinds]
    runs = [pass_of(config, kind, run, kv_heads_of(own, seams)) for kind, own in enumerate(of_kinds)]
    stream = Stream(x, norm(config, layer_weights(weights, 0), config.norms.before_attention, x))
    tapped, experts = [], []
    for layer in range(config.layers):
        if layer in taps:
            tapped.append(seams.all_tokens(stream.x_BTH))
        kind = config.kind(layer)
        own = runs[kind].of_layer(config.keys_of(layer))
        if inputs_BTLP is not None:
            own = replace(own, input_BTP=inputs_BTLP[:, :, layer])
        w = layer_weights(weights, layer) | next_norm(config, weights, layer) | rank_of(config, weights, layer, seams)
        stream = seams.once(run_layer, of_kinds[kind], config.kinds[kind], w, seams, stream, rotaries[kind], own)
        run.keep(config.keys_of(layer), own.state)
        if stream.experts_BTC is not None:
            experts.append(stream.experts_BTC)
            stream = stream._replace(experts_BTC=None)  # or layers would be different functions for a compiler
    if config.layers in taps:
        tapped.append(seams.all_tokens(stream.x_BTH))
    if run.recurrence is not None:
        seams.put_row(run.state, BASE, run.recurrence.rows_B, run.recurrence.base_B)
    chosen = torch.stack(experts, dim=2) if experts else None
    return Hidden(seams.all_tokens(stream.normed_BTH), torch.cat(tapped, dim=-1) if taps else None, chosen)


def pass_of(config: ModelConfig, kind: int, run: Pass, kv_heads: int) -> Pass:
    """Return a pass for the layers of a kind: what their queries see, and where their caches are written."""
    assert run.attend is not None
    ring = run.ring(config.keys_of(config.first(kind)))
    shares = config.kinds[kind].shares_keys
    attend = attend_of(config, config.kinds[kind], over_caches(run) if shares else run.attend, ring)
    run = replace(run, attend=attend, own_keys=not shares)
    if not run.state:  # nothing is cached
        return run
    writes = run.writes if ring is None else run.writes.around(ring)
    return replace(run, writes=writes.of_heads(kv_heads))


def attend_of(config: ModelConfig, layer: Layer, attend: Attend, ring: int | None = None) -> Attend:
    """Return what the queries of a layer see, and how scores are computed; `ring`: the slots of its caches."""
    return replace(attend.within(layer.window, ring), scale=config.attention_scale, cap=config.attention_cap)


def next_norm(config: ModelConfig, weights: Weights, layer: int) -> dict[str, Tensor]:
    """Return the norm after a layer by the name `NEXT_NORM`: of the next layer, if it has one, or the last one."""
    if layer + 1 == config.layers:
        return {NEXT_NORM: weights[NORM]}
    name = config.norms.before_attention
    return {} if name is None else {NEXT_NORM: weights[f"model.layers.{layer + 1}.{name}.weight"]}


def rank_of(config: ModelConfig, weights: Weights, layer: int, seams: Seams) -> dict[str, Tensor]:
    """Return this rank's number, by its vocabulary's offset, as `RANK`; empty unless a layer's experts are by rank."""
    experts = config.layer(layer).experts
    if seams.tp == 1 or experts is None or not experts.by_rank:
        return {}
    return {RANK: weights[OFFSET] // vocab_rows(config.vocab, seams.tp)}


def run_layer(
    config: ModelConfig, layer: Layer, w: Weights, seams: Seams, stream: Stream, rotary: Rotary | None, run: Pass
) -> Stream:
    """Run one layer over its caches (`Pass.of_layer`), then the norm after it: of the next layer, or the last one.

    So a layer that is compiled alone adds its residual and computes the next norm in one loop.
    """
    names = config.norms
    if layer.delta_net is None:
        mixed_BTH = attention(config, w, seams, stream.normed_BTH, rotary, run)
    else:
        mixed_BTH = recurrent(config, layer.delta_net, w, seams, stream.normed_BTH, run)
    x = stream.x_BTH + after(config, w, names.after_attention, mixed_BTH)
    if layer.experts is None or names.before_experts is None:
        inner, experts_BTC = feed_forward(config, layer, w, seams, norm(config, w, names.before_mlp, x))
    else:
        inner, experts_BTC = beside_experts(config, layer, w, seams, x)
    x = x + after(config, w, names.after_mlp, inner)
    if run.input_BTP is not None:
        x = with_input(config, w, seams, x, run.input_BTP)
    if config.layer_scalar:
        x = x * w["layer_scalar"]
    normed = rms_norm(x, w[NEXT_NORM], config.norm_eps, config.norm_style) if NEXT_NORM in w else x
    return Stream(x, normed, experts_BTC)


def after(config: ModelConfig, w: Weights, name: str | None, x: Tensor) -> Tensor:
    """Return what a block adds to the residual: its output, normalised and scaled as the config says."""
    x = norm(config, w, name, x)
    return x if config.residual_scale == 1 else x * config.residual_scale


def layer_weights(weights: Weights, layer: int) -> dict[str, Tensor]:
    """Return one layer's weights, by their names without the layer's prefix."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def project(w: Weights, seams: Seams, x_BTH: Tensor, rows: Mapping[str, int]) -> Tensor:
    """Apply linear layers with `rows` outputs each, with optional biases, and concatenate: [B, T, sum of rows].

    Where the backend stores them as one matrix (`models.weights.FUSED`), they are the last ones of it.
    """
    fused = w.get(fused_name(next(iter(rows))))
    if fused is None:
        out = seams.linears(x_BTH, [w[f"{name}.weight"] for name in rows], list(rows.values()))
    else:
        out = seams.linear(x_BTH, seams.last_outputs(fused, sum(rows.values())), sum(rows.values()))
    biases = [w[f"{name}.bias"] for name in rows if f"{name}.bias" in w]
    return out + torch.cat(biases) if biases else out


def attention(
    config: ModelConfig, w: Weights, seams: Seams, x_BTX: Tensor, rotary: Rotary | None, run: Pass
) -> Tensor:  # fmt: skip
    """Write one layer's keys and values, where it has its own, then attend over its cache: [B, T, H]."""
    assert run.attend is not None
    heads, kv_heads = local_heads(config, seams.tp), kv_heads_of(config, seams)
    x_BTX = seams.all_tokens(x_BTX)
    if run.own_keys:
        turned, v = heads_of(config, w, seams, x_BTX, "qkv").split((heads + kv_heads, kv_heads), dim=1)
        turned = rotate(turned, rotary)
        if config.turned_norm and rotary is not None:
            turned = normalised(turned, config.norm_eps).to(turned.dtype)
        q, k = turned.split((heads, kv_heads), dim=1)
        cached_k = seams.write(run.state, "k", k, run.writes)
        cached_v = seams.write(run.state, "v", v, run.writes)
        keys, values = (cached_k, cached_v) if run.attend.kv else (k, v)
    else:
        q = rotate(heads_of(config, w, seams, x_BTX, "q"), rotary)
        keys, values = run.state["k"], run.state["v"]
    attend = replace(run.attend, sinks_N=w["self_attn.sinks"]) if config.sinks else run.attend
    out_BTX = seams.attend(q, keys, values, attend)
    if config.attention_gate:
        gate_BTX = project(w, seams, x_BTX, {"self_attn.q_gate_proj": heads * config.head_dim})
        out_BTX = out_BTX * torch.sigmoid(gate_BTX)
    out = seams.own_tokens(seams.linear(out_BTX, w["self_attn.o_proj.weight"], config.hidden))
    bias = w.get("self_attn.o_proj.bias")
    return out if bias is None else out + bias


def recurrent(
    config: ModelConfig, net: DeltaNet, w: Weights, seams: Seams, x_BTH: Tensor, run: Pass
) -> Tensor:  # fmt: skip
    """Advance a layer's recurrent state over the tokens: [B, T, H] -> [B, T, H]."""
    assert run.recurrence is not None
    net, x_BTH = net.of_rank(seams.tp), seams.all_tokens(x_BTH)
    rows = dict(zip(delta_net.QKV, (net.keys, net.keys, net.values), strict=True))
    parts = [project(w, seams, x_BTH, {f"linear_attn.{name}": count for name, count in rows.items()})]
    gates = {delta_net.BETA: net.value_heads, delta_net.DECAY: net.value_heads, delta_net.GATE: net.values}
    rest_BTX = project(w, seams, x_BTH, {f"linear_attn.{name}": count for name, count in gates.items()})
    of_state, z_BTX = rest_BTX.split((2 * net.value_heads, net.values), dim=-1)
    out_BTRE = delta_net.mixed(net, w, torch.cat((*parts, of_state), dim=-1), run.state, run.recurrence, seams)
    normed = rms_norm(out_BTRE.to(x_BTH.dtype), w["linear_attn.norm.weight"], config.norm_eps)
    gated_BTRE = normed * functional.silu(z_BTX.view(normed.shape).float())
    out_BTX = gated_BTRE.to(x_BTH.dtype).flatten(2)
    return seams.own_tokens(seams.linear(out_BTX, w["linear_attn.out_proj.weight"], config.hidden))


def store(config: ModelConfig, w: Weights, seams: Seams, x_BTX: Tensor, rotary: Rotary | None, run: Pass) -> None:
    """Write one layer's keys and values without attending."""
    k, v = heads_of(config, w, seams, x_BTX, "kv").chunk(2, dim=1)
    seams.write(run.state, "k", rotate(k, rotary), run.writes)
    seams.write(run.state, "v", v, run.writes)


def kv_heads_of(config: ModelConfig, seams: Seams) -> int:
    """Return the number of KV heads on this rank."""
    return max(config.kv_heads // seams.tp, 1)


def heads_of(config: ModelConfig, w: Weights, seams: Seams, x_BTX: Tensor, names: str) -> Tensor:
    """Return the heads of "qkv", "kv" or "q" concatenated, normalised where the config says so: [B, N, T, D]."""
    kv_heads = kv_heads_of(config, seams)
    counts = {name: local_heads(config, seams.tp) if name == "q" else kv_heads for name in names}
    rows = {f"self_attn.{name}_proj": count * config.head_dim for name, count in counts.items()}
    out = project(w, seams, x_BTX, rows).view(*x_BTX.shape[:2], -1, config.head_dim)
    normed = normed_heads if config.qk_norm == "head" else normed_vectors
    if "v" not in names:
        return (normed(config, w, seams, out, counts) if config.qk_norm else out).transpose(1, 2)
    if config.v_norm:
        rest, v = out.split((out.shape[2] - kv_heads, kv_heads), dim=2)
        out = torch.cat((rest, normalised(v, config.norm_eps).to(v.dtype)), dim=2)
    if config.qk_norm:
        rest, v = out.split((out.shape[2] - kv_heads, kv_heads), dim=2)
        out = torch.cat(
            (normed(config, w, seams, rest, {name: counts[name] for name in names if name in "qk"}), v), dim=2
        )
    return out.transpose(1, 2)


def normed_heads(config: ModelConfig, w: Weights, seams: Seams, x_BTND: Tensor, counts: Mapping[str, int]) -> Tensor:  # noqa: ARG001 - as `normed_vectors`
    """Normalise each head of queries and keys, `counts` of each: [B, T, N, D]."""
    norms = [w[f"self_attn.{name}_norm.weight"].expand(count, -1) for name, count in counts.items()]
    return rms_norm(x_BTND, torch.cat(norms), config.norm_eps, config.norm_style)


def normed_vectors(config: ModelConfig, w: Weights, seams: Seams, x_BTND: Tensor, counts: Mapping[str, int]) -> Tensor:
    """Normalise all queries of a token as one vector, and all its keys, over all ranks: [B, T, N, D]."""
    wide = x_BTND.float()
    parts = wide.split(list(counts.values()), dim=2)
    squares = torch.stack([part.pow(2).sum(dim=(2, 3)) for part in parts], dim=-1)
    if seams.tp > 1:
        squares = seams.all_reduce(squares)
    copies = {"q": 1, "k": max(seams.tp // config.kv_heads, 1)}
    sizes = {"q": config.heads * config.head_dim, "k": config.kv_heads * config.head_dim}
    normed = []
    for index, (name, part) in enumerate(zip(counts, parts, strict=True)):
        mean_BT = squares[..., index] / (copies[name] * sizes[name])
        weight = w[f"self_attn.{name}_norm.weight"].view(counts[name], config.head_dim)
        scaled = part * torch.rsqrt(mean_BT + config.norm_eps)[..., None, None]
        normed.append(norm_scaled(scaled, weight, config.norm_style, x_BTND.dtype))
    return torch.cat(normed, dim=2)


def beside_experts(
    config: ModelConfig, layer: Layer, w: Weights, seams: Seams, x_BTH: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Apply a layer's feed-forward network and its experts, both to the residual stream: [B, T, H] -> [B, T, H].

    The second value is that of `feed_forward`.
    """
    names = config.norms
    own = norm(config, w, names.beside_experts, mlp(config, w, seams, norm(config, w, names.before_mlp, x_BTH)))
    scaled = layer.experts is not None and layer.experts.scaled
    router_BTH = router_input(w, x_BTH, config.norm_eps) if scaled else x_BTH
    out, experts_BTC = feed_forward(config, layer, w, seams, norm(config, w, names.before_experts, x_BTH), router_BTH)
    return own + norm(config, w, names.after_experts, out), experts_BTC


def feed_forward(
    config: ModelConfig, layer: Layer, w: Weights, seams: Seams, x_BTH: Tensor, router_BTH: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Apply a layer's feed-forward network, or its experts: [B, T, H] -> [B, T, H].

    `router_BTH` is what the router reads; None: the same. The second value are the experts of each token, int32
    [B, T, C]; None without experts.
    """
    if layer.experts is None:
        return mlp(config, w, seams, x_BTH), None
    x_BTH = seams.all_tokens(x_BTH)
    chosen = routed(layer.experts, w, seams, x_BTH if router_BTH is None else seams.all_tokens(router_BTH))
    gate, up, down = (f"mlp.experts.{name}_proj" for name in ("gate", "up", "down"))
    biases = (w[f"{gate}.bias"], w[f"{up}.bias"]) if layer.experts.bias else None
    gating = Gating(biases, layer.experts.clamp, config.activation)
    matrices = tuple(w[f"{name}.weight"] for name in (gate, up, down))
    own = of_rank(layer.experts, chosen, seams, w[RANK]) if RANK in w else chosen
    out_BTH = mixed(layer.experts, seams, x_BTH, own, matrices, gating)
    if layer.experts.shared is not None:
        shared_BTH = gated(config, w, seams, x_BTH, SHARED, layer.experts.shared)
        if layer.experts.shared_gate:
            shared_BTH = torch.sigmoid(seams.linear(x_BTH, w[SHARED_GATE], 1)) * shared_BTH
        out_BTH = out_BTH + shared_BTH
    out_BTH = seams.own_tokens(out_BTH)
    if layer.experts.bias:
        out_BTH = out_BTH + shared_out(w[f"{down}.bias"], chosen).to(out_BTH.dtype)
    return out_BTH, chosen.experts.int()


def mlp(config: ModelConfig, w: Weights, seams: Seams, x_BTH: Tensor) -> Tensor:
    """Apply a layer's feed-forward network: [B, T, H] -> [B, T, H]."""
    out = seams.own_tokens(gated(config, w, seams, seams.all_tokens(x_BTH), "mlp", config.intermediate))
    bias = w.get("mlp.down_proj.bias")
    return out if bias is None else out + bias


def gated(config: ModelConfig, w: Weights, seams: Seams, x_BTH: Tensor, base: str, intermediate: int) -> Tensor:
    """Return this rank's part of a gated feed-forward network (Shazeer 2020): [B, T, H] -> [B, T, H]."""
    rows = intermediate // seams.tp
    if config.mlp_bias or config.activation != "silu" or fused_name(f"{base}.gate_proj") in w:
        gate, up = project(w, seams, x_BTH, {f"{base}.gate_proj": rows, f"{base}.up_proj": rows}).chunk(2, dim=-1)
        inner = activated(config.activation, gate) * up
    else:
        inner = seams.swiglu(x_BTH, w[f"{base}.gate_proj.weight"], w[f"{base}.up_proj.weight"], rows)
    return seams.linear(inner, w[f"{base}.down_proj.weight"], config.hidden)
