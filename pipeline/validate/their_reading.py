"""How transformers reads a `config.json`: the properties of the model that it builds, without memory for weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers

from pipeline.files.atomic import disk_errors
from pipeline.files.unfinished import work_folder
from pipeline.models.layer_types import CHUNKED, LAYER_TYPES, SLIDING
from pipeline.validate.reference.skeleton import without_weights

Reading = dict[str, Any]
"""Values that decide a model's output, by name."""


def by_transformers(config_json: Mapping[str, Any]) -> Reading:
    """Return what transformers makes of a config: the properties of the model that it builds, without memory."""
    config = _loaded(config_json)
    with without_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).model
    layer, embedding = model.layers[0], model.embed_tokens
    attention = _attentions(model)[0]
    q, v = _parts(attention, config, attention.head_dim)
    networks = [_network(one) for one in model.layers]
    q_norm = getattr(attention, "q_norm", None)
    reading = {
        "num_hidden_layers": len(model.layers),
        "vocab_size": embedding.num_embeddings,
        "hidden_size": embedding.embedding_dim,
        "inner size by layer": [_inner_size(network) for network in networks],
        "experts": _their_experts(config, model.layers),
        "shares of experts are normalised": _normalises(model.layers),
        "experts beside a network": getattr(getattr(layer, "experts", None), "intermediate_dim", None),
        "biases of experts": hasattr(networks[0], "gate_up_proj_bias"),
        "bounds of SwiGLU": [networks[0].limit, networks[0].alpha] if hasattr(networks[0], "limit") else None,
        "head_dim": attention.head_dim,
        "num_attention_heads": q // attention.head_dim // (2 if _has_gate(model) else 1),
        "biases of q, k, v": v,
        "bias of o": attention.o_proj.bias is not None,
        "mlp_bias": getattr(getattr(networks[0], "gate_proj", None), "bias", None) is not None,
        "sinks": hasattr(attention, "sinks"),
        "norm of q": None if q_norm is None else len(q_norm.weight),
        "norm of turned q": any(hasattr(one, "qk_norm") for one in _attentions(model)),
        "shared expert": next(map(_shared_size, filter(_has_shared, map(_block, model.layers))), None),
        "attention_chunk_size": _chunk(config),
        "norms of a layer": sorted(name for name, _ in layer.named_children() if "norm" in name),
        "rms_norm_eps": _eps(model.norm),
        "activation at 1": _activation_at_1(networks[0]),
        # Gemma 3, which has norms of queries, keeps the field and does not apply it.
        "cap of scores": getattr(attention, "attn_logit_softcapping", None) if q_norm is None else None,
        "cap of logits": getattr(config, "final_logit_softcapping", None),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "layers with rotary embeddings": [_turns(model, one) for one in model.layers],
    }
    reading |= _theirs_by_layer(model, config) | _their_scales(model, config)
    return reading | _their_ropes(model) | windows_read(_windows(model, config))


def _their_scales(model: Any, config: Any) -> Reading:
    """Return what scores, embeddings, residuals and logits are multiplied by."""
    return {
        "scale of attention": _attention_scale(_attentions(model)[0]),
        "scale of embeddings": _embedding_scale(model),
        "scale of residuals": getattr(model.layers[0], "residual_multiplier", 1.0),
        "scale of logits": 1 / getattr(config, "logits_scaling", 1.0),
    }


def _attention_scale(attention: Any) -> float:
    """Return what scores are multiplied by; some classes of 4.57 have no field for the usual scale."""
    return float(getattr(attention, "scaling", attention.head_dim**-0.5))


def _theirs_by_layer(model: Any, config: Any) -> Reading:
    """Return the same as `_by_layer` of transformers' modules."""
    attentions, nets = _attentions(model), [getattr(one, "linear_attn", None) for one in model.layers]
    with_keys = [one.self_attn for one in model.layers if hasattr(one, "self_attn") and not _shares_keys(one)]
    return {
        "head_dim by layer": [one.head_dim for one in attentions],
        "num_key_value_heads": one_or_all([_kv_heads(one, config) for one in with_keys]),
        "values are keys": [getattr(one, "v_proj", 0) is None for one in with_keys],
        "layers of the keys": _keys_of(model),
        "inputs of layers": getattr(model, "hidden_size_per_layer_input", None) or None,
        "values are normalised": hasattr(attentions[0], "v_norm"),
        "output of layers is scaled": hasattr(model.layers[0], "layer_scalar"),
        "recurrent layers": [net is not None for net in nets],
        "heads of recurrent layers": next((_their_net(net) for net in nets if net is not None), None),
        "gate of attention": _has_gate(model),
    }


def _attentions(model: Any) -> list[Any]:
    """Return the attention of layers that have some: others are recurrent."""
    return [one.self_attn for one in model.layers if hasattr(one, "self_attn")]


def _keys_of(model: Any) -> list[int]:
    """Return the layer whose keys and values each layer reads: the last one of its type that has some, or its own."""
    found, of_type = [], {}
    for index, layer in enumerate(model.layers):
        kind = getattr(getattr(layer, "self_attn", None), "layer_type", None)
        if not _shares_keys(layer):
            of_type[kind] = index
        found.append(of_type[kind])
    return found


def _shares_keys(layer: Any) -> bool:
    """Return whether a layer reads keys and values of another one."""
    return bool(getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False))


def _has_gate(model: Any) -> bool:
    """Return whether queries and the gate of attention are one matrix: of families whose other layers are recurrent."""
    return any(hasattr(one, "linear_attn") for one in model.layers) or hasattr(model.config, "linear_num_key_heads")


def _their_net(net: Any) -> list[int]:
    return [net.num_k_heads, net.num_v_heads, net.head_k_dim, net.head_v_dim, net.conv_kernel_size]


def _network(layer: Any) -> Any:
    """Return a layer's feed-forward network, or its experts; in 4.57 these are a list of networks."""
    block = _block(layer) or layer.shared_mlp
    experts = getattr(block, "experts", None)
    if experts is None:
        return block
    return experts[0] if isinstance(experts, torch.nn.ModuleList) else experts


def _block(layer: Any) -> Any:
    """Return a layer's feed-forward block by its usual names; None of Granite 4 without experts."""
    names = ("mlp", "block_sparse_moe", "feed_forward")
    return next((getattr(layer, name) for name in names if getattr(layer, name, None) is not None), None)


def _has_shared(block: Any) -> bool:
    """Return whether a block has an expert of every token."""
    return hasattr(block, "shared_expert")


def _shared_size(block: Any) -> list[Any]:
    """Return the inner size of an expert of every token, and whether it has a gate."""
    return [_inner_size(block.shared_expert), hasattr(block, "shared_expert_gate")]


def _chunk(config: Any) -> int | None:
    """Return the length of the chunks within which some layers attend."""
    within = CHUNKED in (getattr(config, "layer_types", None) or ())
    return int(config.attention_chunk_size) if within else None


def _activation_at_1(network: Any) -> float | None:
    """Return the value of an activation function at 1; None of a bounded SwiGLU, which has no other one."""
    if hasattr(network, "limit"):
        return None
    act = next(getattr(network, name) for name in ("act_fn", "activation_fn", "activation") if hasattr(network, name))
    return float(act(torch.ones(())))


def _inner_size(network: Any) -> int:
    """Return the inner size of a network or of experts: the columns of the last matrix, or a field of its own."""
    if hasattr(network, "expert_dim") or hasattr(network, "gate_up_proj_bias"):  # matrices with the inputs first
        return int(network.intermediate_size)
    names = ("down_proj", "w2", "output_linear")
    down = next(getattr(network, name) for name in names if hasattr(network, name))
    matrix: Any = down.weight if isinstance(down, torch.nn.Module) else down
    return int(matrix.shape[-1])


def _their_experts(config: Any, layers: Iterable[Any]) -> list[int] | None:
    """Return the number of experts and of those of a token, if some layer has a router; None otherwise."""
    if not _routers(layers):
        return None
    chosen = getattr(config, "top_k_experts", None) or config.num_experts_per_tok
    return [getattr(config, "num_experts", None) or config.num_local_experts, chosen]


def _routers(layers: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return the routers of layers, each after the module that has it."""
    places = (place for layer in layers for place in (layer, _block(layer)))
    found = ((place, getattr(place, "gate", None) or getattr(place, "router", None)) for place in places)
    return [(place, router) for place, router in found if router is not None]


def _normalises(layers: Iterable[Any]) -> bool | None:
    """Return whether shares of experts have the sum 1, as in classes without a switch; None of Llama 4's sigmoids."""
    routers = _routers(layers)
    if not routers or any(hasattr(layer, "feed_forward") for layer in layers):
        return None
    place, router = routers[0]
    return bool(getattr(place, "norm_topk_prob", getattr(router, "norm_topk_prob", True)))


def _turns(model: Any, layer: Any) -> bool:
    """Return whether queries and keys of a layer turn; Granite 4 may have no rotary embedding at all."""
    return (
        getattr(model, "rotary_emb", True) is not None  # Olmo 3 has one for each type of layers in 4.57
        and hasattr(layer, "self_attn")
        and bool(getattr(layer.self_attn, "use_rope", True))
    )


def _parts(attention: Any, config: Any, size: int) -> tuple[int, bool]:
    """Return the rows of q, and whether q, k and v have biases."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj.out_features, attention.q_proj.bias is not None
    return config.num_attention_heads * size, attention.qkv_proj.bias is not None


def _kv_heads(attention: Any, config: Any) -> int:
    """Return the number of KV heads of a layer."""
    if hasattr(attention, "k_proj"):
        return int(attention.k_proj.out_features) // int(attention.head_dim)
    rows = config.num_attention_heads * attention.head_dim
    return int(attention.qkv_proj.out_features - rows) // 2 // int(attention.head_dim)


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _embedding_scale(model: Any) -> float:
    """Return by what a model multiplies embeddings; some versions do so for Gemma 2 in its class, without a field."""
    if hasattr(model.embed_tokens, "embed_scale"):
        return float(model.embed_tokens.embed_scale)
    if hasattr(model, "embedding_multiplier"):
        return float(model.embedding_multiplier)
    return float(model.config.hidden_size**0.5) if model.config.model_type == "gemma2" else 1.0


def _their_ropes(model: Any) -> Reading:
    """Return frequencies and scale by type of layers; one embedding of all types stands for each."""
    found: Reading = {}
    for of in LAYER_TYPES:
        rotary = _rotary_of(model, of)
        prefix = f"{of}_" if hasattr(rotary, f"{of}_inv_freq") else ""
        if hasattr(rotary, f"{prefix}inv_freq"):
            found[f"scale of rotary embeddings, {of}"] = getattr(rotary, f"{prefix}attention_scaling")
            found[f"rotary frequencies, {of}"] = getattr(rotary, f"{prefix}inv_freq")
    return found


def _rotary_of(model: Any, of: str) -> Any:
    """Return the module of a type of layers; 4.57 has one for each type."""
    if hasattr(model, "rotary_embs"):
        return model.rotary_embs[of]
    return model.rotary_emb_local if of == SLIDING and hasattr(model, "rotary_emb_local") else model.rotary_emb


def _loaded(config_json: Mapping[str, Any]) -> Any:
    """Return the config that transformers reads from a folder: it chooses the class by more than `model_type`."""
    with work_folder("config") as folder, disk_errors(folder):
        (folder / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _windows(model: Any, config: Any) -> list[int | None]:
    """Return the sliding window of each layer's cache, as transformers builds it; of a layer without one, its own."""
    caches = transformers.DynamicCache(config=config).layers[: len(model.layers)]
    windows = [vars(cache).get("sliding_window") for cache in caches] or [None] * len(model.layers)
    if _chunk(config) is not None:  # whose caches forget what is outside a chunk
        windows = [None] * len(model.layers)
    return [
        layer.self_attn.sliding_window if _shares_keys(layer) else window
        for layer, window in zip(model.layers, windows, strict=True)
    ]


def one_or_all(of_layers: list[int]) -> int | list[int]:
    """Return the value that all layers have, or that of each."""
    return of_layers[0] if len(set(of_layers)) == 1 else of_layers


def windows_read(windows: Sequence[int | None]) -> Reading:
    """Return the smallest window of any layer, and those of all."""
    return {"sliding_window": min(filter(None, windows), default=None), "sliding windows by layer": list(windows)}
