"""Write EAGLE-3 heads and their logits with the public tools' own classes: `python public_heads.py OUT`.

Runs in the environment of `make test-drafts`, with speculators and SpecForge and without this project. Each folder of
OUT is a head as its tool saves it, with `reference.safetensors`: tokens [T + 1], tapped states [T, X], and logits of
two drafts in a row from each slot, [2, T, V], with the text's own tokens in between.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

TOKENS, HIDDEN, VOCAB, DRAFT_VOCAB = 12, 64, 512, 128
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "vocab_size": VOCAB, "num_hidden_layers": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Give every parameter values by a seed, norms around one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)


def inputs(width: int) -> tuple[Tensor, Tensor]:
    """Return tokens [T + 1] and states [T, X]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (TOKENS + 1,), generator=generator)
    return tokens, torch.randn(TOKENS, width, generator=generator)


def maps(size: int) -> tuple[Tensor, Tensor]:
    """Return `t2d` and `d2t` of an ascending vocabulary."""
    ids = torch.linspace(2, VOCAB - 1, size).long().unique()
    marked = torch.zeros(VOCAB, dtype=torch.bool)
    marked[ids] = True
    return marked, ids - torch.arange(size)


def write_speculators(out: Path, layer: Any, draft_vocab: int, **fields: Any) -> None:
    """Write a head of speculators."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    layer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=draft_vocab,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="org/target", architectures=["LlamaForCausalLM"]),
        ),
        **fields,
    )
    model = Eagle3DraftModel(config).eval()
    randomize(model)
    if draft_vocab != VOCAB:
        model.load_vocab_mappings(*maps(draft_vocab))
    model.save_pretrained(out)
    tokens, states = inputs(model.fc.in_features)
    found: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: found.append(logits[0]))
    with torch.no_grad():
        model(
            states[None], tokens[None, 1:], document_ids=torch.zeros(1, TOKENS, dtype=torch.long), ttt_steps=2,
        )  # fmt: skip
    reference(out, tokens, states, found[:2])


def write_specforge(out: Path, draft_vocab: int, **fields: Any) -> None:
    """Write a head of SpecForge."""
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3, prepare_decoder_attention_mask

    config = LlamaConfig(**SIZES, draft_vocab_size=draft_vocab, pad_token_id=0, **fields)
    config.architectures = ["LlamaForCausalLMEagle3"]
    model = LlamaForCausalLMEagle3(config).eval()
    randomize(model)
    if draft_vocab != VOCAB:
        model.t2d, model.d2t = maps(draft_vocab)
    model.save_pretrained(out)
    tokens, states = inputs(3 * getattr(config, "target_hidden_size", HIDDEN))
    found = []
    with torch.no_grad():
        hidden, cache = model.project_hidden_states(states[None]), [[], []]
        mask = prepare_decoder_attention_mask(torch.ones(1, TOKENS, dtype=torch.bool), (1, TOKENS), hidden, 0)
        ahead = torch.cat((tokens[1:], torch.zeros(2, dtype=torch.long)))
        for step in range(2):
            embedded = model.embed_input_ids(ahead[None, step : step + TOKENS])
            hidden = model.backbone(embedded, hidden, cache, mask, torch.arange(TOKENS)[None])
            found.append(model.compute_logits(hidden)[0])
    reference(out, tokens, states, found)


def reference(out: Path, tokens: Tensor, states: Tensor, logits: list[Tensor]) -> None:
    """Write the inputs and the logits."""
    tensors = {"tokens": tokens, "states": states, "logits": torch.stack(logits).float()}
    save_file(tensors, out / "reference.safetensors")


def main(out: Path) -> None:
    """Write every head."""
    llama, qwen3 = LlamaConfig(**SIZES), Qwen3Config(**SIZES)
    biased = LlamaConfig(**SIZES, attention_bias=True)
    listed = {"eagle_aux_hidden_state_layer_ids": [2, 6, 9]}
    write_speculators(out / "speculators", llama, DRAFT_VOCAB, norm_before_residual=True, **listed)
    write_speculators(out / "speculators-plain", llama, DRAFT_VOCAB, norm_before_residual=False)
    write_speculators(out / "speculators-qwen3", qwen3, DRAFT_VOCAB, norm_before_residual=True, **listed)
    write_speculators(out / "speculators-bias", biased, DRAFT_VOCAB, norm_before_residual=True, **listed)
    five = {"eagle_aux_hidden_state_layer_ids": [1, 3, 6, 9, 12]}
    write_speculators(out / "speculators-3.1", llama, DRAFT_VOCAB, fc_norm=True, norm_output=True, **five)
    write_speculators(out / "speculators-before-fc", llama, DRAFT_VOCAB, norm_before_fc=True, **listed)
    write_speculators(out / "speculators-whole", llama, VOCAB, norm_before_residual=True, **listed)
    ids = {"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 5, 8]}}
    write_specforge(out / "specforge", DRAFT_VOCAB)
    write_specforge(out / "specforge-ids", DRAFT_VOCAB, **ids)
    write_specforge(out / "specforge-3.1", DRAFT_VOCAB, fc_norm=True, norm_output=True, **ids)
    write_specforge(out / "specforge-wide", DRAFT_VOCAB, target_hidden_size=96)
    write_specforge(out / "specforge-whole", VOCAB)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
