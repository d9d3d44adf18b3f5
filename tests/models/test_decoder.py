"""Decoders against transformers: logits of random small models of each family."""

import pytest
import torch
import transformers

from pipeline.errors import SourceError
from pipeline.models.decoder import hidden_states, logits
from pipeline.models.families import config_of
from pipeline.models.parallel import Pass, Seams, attend_up_to, plan_writes

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama2": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}),
    "linear-rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "one-kv-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("Mistral", {"sliding_window": 64}),  # never reached in a cache of 64
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
}


def reference(case: str):
    name, changes = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    config = getattr(transformers, f"{name}Config")(**(SMALL | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return config, model


def run(config, weights, tokens, start, state):
    rows, count = tokens.shape
    positions = start + torch.arange(count).expand(rows, count)
    seams, kv = Seams(), 64
    keep = torch.ones(rows, count, dtype=torch.bool)
    writes = plan_writes(state, torch.arange(rows), positions, keep)
    attend = attend_up_to(positions, kv)
    hidden = hidden_states(config, weights, seams, tokens, Pass(positions, state, writes, attend))
    return logits(config, weights, seams, hidden.last_BTH)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    hf_config, model = reference(case)
    config = config_of(hf_config.to_dict(), case)
    state = {
        f"{part}.{layer}": torch.zeros(2, config.kv_heads, 65, config.head_dim)
        for layer in range(config.layers)
        for part in ("k", "v")
    }
    tokens = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        expected = model(tokens).logits
        weights = dict(model.state_dict())
        first = run(config, weights, tokens[:, :33], 0, state)
        second = run(config, weights, tokens[:, 33:38], 33, state)
        last = run(config, weights, tokens[:, 38:39], 38, state)
    got = torch.cat((first, second, last), dim=1)
    error = (got - expected[:, :39]).abs()
    assert error.max() < 2e-4, f"max {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_config_of_refuses_by_name(change, named):
    with pytest.raises(SourceError, match=named):
        config_of({"model_type": "llama"} | SMALL | change, "config.json")


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4096}, 4096),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3, "sliding_window": 4096}, None),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3, "use_sliding_window": True}, 4096),
    ],
)
def test_config_of_knows_an_active_window(change, window):
    assert config_of({"model_type": "llama"} | SMALL | change, "config.json").window == window
