"""Recurrent layers: logits and states against transformers, and rows that return to earlier tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.graphs.spec import GraphSpec
from pipeline.models.caches import empty_caches
from pipeline.models.delta_net import Heads, scan, unit_inverse
from pipeline.models.families import config_of
from pipeline.models.parallel import Seams
from pipeline.speculation.model import Model
from pipeline.validate.reference.skeleton import for_module
from support.pairs import Pair, make_pair
from support.pairs import empty_state as empty_pair

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
}  # fmt: skip
CLASSES = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
}
REPLAYED = 6
LINEAR, FULL = "linear_attention", "full_attention"
PAIR = {
    "model_type": "qwen3_5_text", "layer_types": [LINEAR, FULL, LINEAR], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3,
    "draft": {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL]},
}  # fmt: skip
STEPS = 4


def random_config(family: str, seed: int) -> dict[str, Any]:
    """A small config of other sizes, and of other layers, each time."""
    draw = random.Random(f"{family} {seed}")
    key_heads = draw.choice([1, 2, 3])
    types = [draw.choice([LINEAR, LINEAR, FULL]) for _ in range(3)]
    types.insert(draw.randrange(4), FULL)
    return SMALL | (MIXTURE if "text" not in family or "moe" in family else {}) | {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw.choice([1, 2, 3]),
        "linear_key_head_dim": draw.choice([4, 8, 10]),
        "linear_value_head_dim": draw.choice([6, 8, 12]),
        "linear_conv_kernel_dim": draw.choice([2, 3, 4]),
        "layer_types": types,
        "attention_bias": draw.random() < 0.3,
        "tie_word_embeddings": draw.random() < 0.3,
        "partial_rotary_factor": draw.choice([0.25, 0.5]),
    }  # fmt: skip


def reference(family: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """A random model of transformers, and its config."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[family]
    config = getattr(transformers, config_class)(**random_config(family, seed))
    model = getattr(transformers, model_class)(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
            if name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter) * 3 - 2)
    return model, config.to_dict()


def loaded(model: Any, config_json: dict[str, Any]) -> Model:
    """Our model with the same weights, and states of garbage."""
    config = config_of(config_json, "config.json")
    return Model(config, dict(parts_of(model.state_dict(), config)), garbage(config), Seams())


def parts_of(state: dict[str, Tensor], c: Any):  # noqa: C901 - a table, not logic
    """The weights that matrices of transformers hold."""
    net = c.delta_net
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        block, _, module = stem.rpartition(".")

        def named(parts, tensors, block=block, leaf=leaf):
            return [(f"{block}.{part}.{leaf}", own) for part, own in zip(parts, tensors, strict=True)]

        def groups(sizes, count, tensor=tensor):
            grouped = tensor.unflatten(0, (count, -1))
            return [own.flatten(0, 1) for own in grouped.split(sizes, dim=1)]

        ratio = net.value_heads // net.key_heads
        values = ratio * net.value_dim
        if module == "q_proj":
            yield from named(("q_proj", "q_gate_proj"), groups([c.head_dim] * 2, c.heads))
        elif module == "in_proj_qkv":
            yield from named(("q_proj", "k_proj", "v_proj"), tensor.split([net.keys, net.keys, net.values]))
        elif module == "conv1d":
            own = tensor.split([net.keys, net.keys, net.values])
            yield from named(("q_conv", "k_conv", "v_conv"), [one.flatten() for one in own])
        elif module == "in_proj_z":
            yield from named(("z_proj",), [tensor])
        elif module == "in_proj_qkvz":
            sizes = [net.key_dim, net.key_dim, values, values]
            yield from named(("q_proj", "k_proj", "v_proj", "z_proj"), groups(sizes, net.key_heads))
        elif module == "in_proj_ba":
            yield from named(("in_proj_b", "in_proj_a"), groups([ratio] * 2, net.key_heads))
        elif name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                yield name.replace("gate_up_proj", f"{part}_proj.weight"), half
        else:
            yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), tensor


def garbage(config: Any, rows: int = 3, length: int = 200) -> dict[str, Tensor]:
    """States of other requests, which must not be read."""
    state = empty_caches(config, rows, length, torch.float32, replayed=REPLAYED)
    return {name: torch.full_like(tensor, 3) for name, tensor in state.items()}


def read(model: Model, tokens: Tensor, start: int, active: list[bool] | None = None) -> Tensor:
    rows, count = tokens.shape
    positions = start + torch.arange(count).expand(rows, count)
    hidden = model.hidden(tokens, positions, torch.tensor(active or [True] * rows), 200)
    return model.logits(hidden.last_BTH)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", CLASSES)
def test_logits_of_any_chunks_equal_transformers(family, seed):
    """Random configs and splits, one longer than a chunk of the recurrence; after most, rows read what is rejected."""
    hf_model, config_json = reference(family, seed)
    model, draw, at, worst = loaded(hf_model, config_json), random.Random(seed), 0, 0.0
    tokens = torch.randint(0, 97, (3, 170))
    with torch.no_grad():
        expected = hf_model(tokens).logits
        while at < tokens.shape[1]:
            count = min(draw.choice([1, 1, 2, 3, 5, 20, 70, 90]), tokens.shape[1] - at)
            got = read(model, tokens[:, at : at + count], at)
            worst = max(worst, float((got - expected[:, at : at + count]).abs().max()))
            back = draw.randint(0, min(count, REPLAYED // 2))
            at += count - back
            wrong = draw.randint(1, REPLAYED - back)
            read(model, torch.randint(0, 97, (3, wrong)), at, [True, False, True])
    assert worst < 2e-4


def test_parameters_are_put_together_as_transformers_has_them():
    """Back from our weights to the modules of the reference."""
    for family in CLASSES:
        hf_model, config_json = reference(family, 1)
        config = config_of(config_json, "config.json")
        own = dict(parts_of(hf_model.state_dict(), config))
        for index, layer in enumerate(hf_model.model.layers):
            prefix = f"model.layers.{index}."
            mine = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
            kept = {name: tensor for name, tensor in layer.state_dict().items() if ".experts." not in name}
            for name, tensor in for_module(kept, mine, config).items():
                assert torch.equal(tensor, kept[name]), name


def token_by_token(heads: Heads, state: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Outputs and states after each token, by the definition."""
    found = []
    for t in range(heads.q.shape[2]):
        q, k, v = heads.q[:, :, t], heads.k[:, :, t], heads.v[:, :, t]
        state = state * heads.decay[:, :, t].exp()[..., None, None]
        seen = (state * k[..., None]).sum(-2)
        state = state + k[..., None] * ((v - seen) * heads.beta[:, :, t, None])[..., None, :]
        found.append(((state * q[..., None]).sum(-2), state))
    return found


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 150])
def test_scan_equals_the_recurrence(tokens):
    """Outputs, and states after any number of kept tokens, another one in each row."""
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 3, tokens, 5, generator=generator), dim=-1) for _ in "qk")
    v = torch.randn(2, 3, tokens, 4, generator=generator)
    decay, beta = -torch.rand(2, 3, tokens, generator=generator), torch.rand(2, 3, tokens, generator=generator)
    state, heads = torch.randn(2, 3, 5, 4, generator=generator), Heads(q, k, v, decay, beta)
    wanted = token_by_token(heads, state)
    for counts in {(0, tokens), (tokens // 2, tokens - 1), (tokens, min(tokens, 64))}:
        kept = torch.arange(tokens) < torch.tensor(counts)[:, None]
        out, after = scan(heads, state, kept)
        torch.testing.assert_close(out, torch.stack([one for one, _ in wanted], dim=2), atol=2e-5, rtol=1e-4)
        for row, count in enumerate(counts):
            expected = wanted[count - 1][1][row] if count else state[row]
            torch.testing.assert_close(after[row], expected, atol=2e-5, rtol=1e-4)


def test_unit_inverse_is_stable_for_equal_keys():
    """Powers of such a matrix grow to 1e17 and cancel: a sum of powers has no digit right."""
    below = torch.ones(64, 64).tril(-1)
    product = unit_inverse(below) @ (below + torch.eye(64))
    torch.testing.assert_close(product, torch.eye(64), atol=1e-4, rtol=0)


def stepped(pair: Pair, spec: GraphSpec, row: list[int], copied: list[int] | None = None) -> list[int]:
    """One step of a row; `copied` are its drafts."""
    given = {"last_token": [row[-1]], "position": [len(row) - 1], "active": [True]}
    if copied is not None:
        given["copied"] = [copied]
    out = pair.step(spec, **given)
    return out[0].tolist() if spec.phase == "decode" else out[0][0, : int(out[1])].tolist()


@pytest.mark.parametrize("agreement", ["some", "none"])
def test_a_rejection_at_every_place_changes_no_token(agreement):
    """All pairs of accepted counts in a row, from right drafts up to each place; the draft has a state of its own."""
    pair = make_pair(agreement, rows=1, length=40, family=PAIR, replayed=STEPS + 3)
    spec, prompt = GraphSpec("speculate", 1, STEPS + 1, 40, STEPS), [5, 9, 3]
    wanted = prompt + pair.greedy(prompt, 24)
    for first in range(STEPS + 1):
        for second in range(STEPS + 1):
            pair.state = empty_pair(pair.shape)
            row = [*prompt, int(pair.prefill([prompt])[0])]
            for accepted in (first, second, STEPS):
                right = wanted[len(row) : len(row) + STEPS]
                copied = [token if place < accepted else (token + 1) % 61 for place, token in enumerate(right)]
                new = stepped(pair, spec, row, copied)
                assert len(new) == accepted + 1
                row += new
            for _ in range(3):
                row += stepped(pair, GraphSpec("decode", 1, 1, 40), row)
            assert row == wanted[: len(row)], (first, second)


def test_drafts_of_a_recurrent_draft_are_its_own_after_any_rejection():
    """Without copies: the draft that is the target has every draft accepted, whatever was rejected before."""
    pair = make_pair("all", rows=1, length=40, family=PAIR, replayed=STEPS + 3)
    prompt = [5, 9, 3]
    wanted, spec = prompt + pair.greedy(prompt, 24), GraphSpec("speculate", 1, STEPS + 1, 40, STEPS)
    for accepted in range(STEPS):
        pair.state = empty_pair(pair.shape)
        row = [*prompt, int(pair.prefill([prompt])[0])]
        right = wanted[len(row) : len(row) + STEPS]
        row += stepped(pair, spec, row, [t if i < accepted else (t + 1) % 61 for i, t in enumerate(right)])
        for _ in range(2):
            new = stepped(pair, spec, row)
            assert len(new) == STEPS + 1
            row += new
        assert row == wanted[: len(row)]


def test_rows_that_return_too_far_are_wrong():
    """The rollback is what makes tokens right: with fewer kept inputs than drafts they change."""
    pair = make_pair("some", rows=1, length=40, family=PAIR, replayed=1)
    prompt, spec = [5, 9, 3], GraphSpec("speculate", 1, STEPS + 1, 40, STEPS)
    wanted = pair.greedy(prompt, 20)
    row = [*prompt, int(pair.prefill([prompt])[0])]
    while len(row) < 3 + 20:
        row += stepped(pair, spec, row)
    assert row[3:23] != wanted


def test_inactive_rows_keep_their_states():
    pair = make_pair("some", rows=3, length=40, family=PAIR, replayed=2)
    pair.prefill([[5, 9, 3], [7, 8, 9, 10, 11], [1, 2, 3, 4, 5, 6, 8]])
    before = {name: tensor.clone() for name, tensor in pair.state.items()}
    active = torch.tensor([False, True, False])
    for spec in (GraphSpec("decode", 3, 1, 40), GraphSpec("speculate", 3, STEPS + 1, 40, STEPS)):
        pair.step(spec, last_token=[1, 2, 3], position=[0, 5, 7], active=active)
    changed = [name for name, tensor in pair.state.items() if not torch.equal(tensor[1], before[name][1])]
    assert any("delta." in name for name in changed)
    for name, tensor in pair.state.items():
        if any(part in name for part in ("delta.", "recent.", "base")):
            assert torch.equal(tensor[[0, 2]], before[name][[0, 2]]), name


def test_padding_of_score_graphs_does_not_enter_states():
    """A row of one token, beside one of five, continues as if it had been read alone."""
    pair = make_pair("some", rows=2, length=40, family=PAIR, replayed=1)
    spec = GraphSpec("score", 2, 5, 40, model="target")
    tokens = torch.tensor([[4, 1, 2, 3, 5], [9, 0, 0, 0, 0]])
    first = pair.step(spec, tokens=tokens, position=[0, 0], lengths=[5, 1])[0]
    later = pair.step(spec, tokens=torch.tensor([[6, 0, 0, 0, 0], [8, 7, 0, 0, 0]]), position=[5, 1], lengths=[1, 2])[0]
    for row, text in enumerate(([4, 1, 2, 3, 5, 6], [9, 8, 7])):
        wanted, size = pair.logits("target", text), 5 if row == 0 else 1
        torch.testing.assert_close(first[row, :size], wanted[:size], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(later[row, : len(text) - size], wanted[size:], atol=1e-4, rtol=1e-4)
