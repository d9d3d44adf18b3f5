"""Write heads and their logits with the public tools' own classes: `python public_heads.py OUT`.

Runs in the environment of `make test-drafts`, with speculators and SpecForge and without this project. Each folder of
OUT is a head as its tool saves it, with `reference.safetensors`: tokens [T + 1], tapped states [T, X], and logits of
two drafts in a row from each slot, [2, T, V], with the text's own tokens in between. Of a P-EAGLE head of speculators
they are the logits of its sampled slots [M, V], with `anchor` and `depth` [M]; one of SpecForge has none, because its
attention needs a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

TOKENS, HIDDEN, VOCAB, DRAFT_VOCAB, RANK = 12, 64, 512, 128, 16
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


class Done(Exception):
    """Ends a forward pass of a training once its logits are known."""


def write_p_eagle(out: Path, layer: Any, **fields: Any) -> None:
    """Write a P-EAGLE head of speculators."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig, core
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    layer._attn_implementation = "eager"
    config = PEagleSpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=DRAFT_VOCAB,
        mask_token_id=7,
        speculators_config=SpeculatorsConfig(
            algorithm="peagle",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=4)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="org/target", architectures=["LlamaForCausalLM"]),
        ),
        **fields,
    )
    model = PEagleDraftModel(config).eval()
    randomize(model)
    model.load_vocab_mappings(*maps(DRAFT_VOCAB))
    model.save_pretrained(out)
    tokens, states = inputs(model.fc.in_features)
    slots: list[Tensor] = []
    sampled = core.generate_cod_sample_indices
    core.generate_cod_sample_indices = lambda **given: slots.extend(sampled(**given)) or slots
    found = logits_of(
        model, states[None], tokens[None, 1:], document_ids=torch.zeros(1, TOKENS, dtype=torch.long),
        loss_mask=(torch.arange(TOKENS) > 0)[None].float(), verifier_last_hidden_states=torch.zeros(1, TOKENS, HIDDEN),
        num_depths=4, down_sample_ratio=1.0, down_sample_ratio_min=1.0,
    )  # fmt: skip
    core.generate_cod_sample_indices = sampled
    known = {"tokens": tokens, "states": states, "logits": found, "anchor": slots[0], "depth": slots[1]}
    save_file({name: tensor.contiguous() for name, tensor in known.items()}, out / "reference.safetensors")


def logits_of(model: Any, *given: Any, **named: Any) -> Tensor:
    """Return the logits of a training's forward pass, [M, V], without its loss."""
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, logits: Tensor) -> None:
        found.append(logits[0])
        raise Done

    hook = model.lm_head.register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(*given, **named)
    except Done:
        hook.remove()
    return found[0]


def losses_of(model: Any, *given: Any, **named: Any) -> Tensor:
    """Return the logits of which a DSpark training computes its loss, [M, V]: those with the Markov head's bias."""
    from speculators.models.dspark import core

    found: list[Tensor] = []

    def keep(logits: Tensor, *_rest: Any, **_named: Any) -> None:
        found.append(logits[0])
        raise Done

    compute, core.compute_metrics = core.compute_metrics, keep
    try:
        with torch.no_grad():
            model(*given, **named)
    except Done:
        core.compute_metrics = compute
    return found[0]


def write_dflash(out: Path, draft_vocab: int, dspark: dict[str, Any] | None = None, **layer: Any) -> None:
    """Write a DFlash draft of speculators, or a DSpark draft with fields of its own."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    own = Qwen3Config(**SIZES | {"num_hidden_layers": 2} | layer)
    own._attn_implementation = "eager"
    is_dspark = dspark is not None and "markov_rank" in dspark
    config = (DSparkSpeculatorConfig if is_dspark else DFlashSpeculatorConfig)(
        transformer_layer_config=own,
        draft_vocab_size=draft_vocab,
        mask_token_id=7,
        block_size=4,
        aux_hidden_state_layer_ids=[2, 6, 9],
        speculators_config=SpeculatorsConfig(
            algorithm="dspark" if is_dspark else "dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="org/target", architectures=["LlamaForCausalLM"]),
        ),
        **dspark or {},
    )
    model = (DSparkDraftModel if is_dspark else DFlashDraftModel)(config).eval()
    randomize(model)
    if draft_vocab != VOCAB:
        model.load_vocab_mappings(*maps(draft_vocab))
    model.save_pretrained(out)
    write_blocks(out, model, is_dspark=is_dspark)


def write_blocks(out: Path, model: Any, *, is_dspark: bool = False) -> None:
    """Write the logits of blocks of a DFlash or DSpark draft of speculators, at valid anchors of its training."""
    from speculators.models.dflash import core

    tokens, states = inputs(model.fc.in_features)
    anchors: list[Tensor] = []
    select = core.select_anchors
    core.select_anchors = lambda *given: anchors.extend(select(*given)) or anchors
    named = {
        "document_ids": torch.zeros(1, TOKENS, dtype=torch.long), "loss_mask": (torch.arange(TOKENS) > 0)[None].float(),
        "verifier_last_hidden_states": torch.zeros(1, TOKENS, HIDDEN), "max_anchors": 5,
    }  # fmt: skip
    if is_dspark:
        found = losses_of(model, states[None], tokens[None, :TOKENS], **named)
    else:
        found = logits_of(model, states[None], tokens[None, :TOKENS], **named)
    core.select_anchors = select
    of_target = {"model.embed_tokens.weight": model.embed_tokens.weight, "lm_head.weight": model.lm_head.weight}
    known = {
        "tokens": tokens,
        "states": states,
        "logits": found.view(5, model.block_size, -1)[anchors[1]],
        "anchor": anchors[0][anchors[1]],
        **of_target,
    }
    save_file({name: t.detach().clone().contiguous() for name, t in known.items()}, out / "reference.safetensors")


def read_dflash(folder: Path) -> None:
    """Write the logits of a DFlash draft that another tool wrote, as speculators reads it.

    The embedding, which the file does not have, is random.
    """
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig

    config = DFlashSpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = DFlashDraftModel(config).eval()
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    of_target = {"embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
    assert (set(found.missing_keys), found.unexpected_keys) == (of_target, []), found
    torch.nn.init.normal_(model.embed_tokens.weight, generator=torch.Generator().manual_seed(3))
    write_blocks(folder, model.float())


def write_specforge_dflash(out: Path) -> None:
    """Write a DFlash draft of SpecForge, with logits of blocks at some positions by its own forward pass."""
    from specforge.modeling.draft.dflash import DFlashDraftModel

    options = {"mask_token_id": 7, "target_layer_ids": [1, 5, 8]}
    config = Qwen3Config(**SIZES | {"num_hidden_layers": 2}, block_size=4, num_target_layers=12, dflash_config=options)
    config._attn_implementation = "eager"
    model = DFlashDraftModel(config).eval()
    randomize(model)
    model.save_pretrained(out)
    tokens, states = inputs(model.fc.in_features)
    generator = torch.Generator().manual_seed(2)
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2))
    anchors, found = torch.tensor([1, 4, 9]), []
    with torch.no_grad():
        for anchor in anchors.tolist():
            block = embedding[torch.tensor([tokens[anchor], 7, 7, 7])][None]
            positions = torch.arange(anchor + 4)[None]
            hidden = model(positions, noise_embedding=block, target_hidden=states[None, :anchor])
            found.append(hidden[0] @ head.T)
    known = {"tokens": tokens, "states": states, "logits": torch.stack(found), "anchor": anchors}
    save_file(known | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}, out / "reference.safetensors")


def write_specforge_dspark(out: Path, kind: str) -> None:
    """Write a DSpark draft of SpecForge, with logits of blocks in the layout of its training."""
    from specforge.modeling.draft.dspark import DSparkDraftModel

    options = {
        "mask_token_id": 7, "target_layer_ids": [1, 5, 8], "projector_type": "dspark", "markov_rank": RANK,
        "markov_head_type": kind, "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    config = Qwen3Config(**SIZES | {"num_hidden_layers": 2}, block_size=4, num_target_layers=12, dflash_config=options)
    config._attn_implementation = "eager"
    model = DSparkDraftModel(config).eval()
    randomize(model)
    model.save_pretrained(out)
    tokens, states = inputs(model.fc.in_features)
    generator = torch.Generator().manual_seed(2)
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2))
    anchors, found = torch.tensor([1, 4, 8]), []
    with torch.no_grad():
        for anchor in anchors.tolist():
            block = embedding[torch.tensor([tokens[anchor], 7, 7, 7])][None]
            positions = torch.arange(anchor + 4)[None]
            hidden = model(positions, noise_embedding=block, target_hidden=states[None, :anchor])
            before = tokens[anchor : anchor + 4][None]
            found.append(model.apply_logits_head(hidden @ head.T, prev_token_ids=before, hidden_states=hidden)[0])
    known = {"tokens": tokens, "states": states, "logits": torch.stack(found), "anchor": anchors}
    save_file(known | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}, out / "reference.safetensors")


def write_specforge_p_eagle(out: Path) -> None:
    """Write a P-EAGLE head of SpecForge, whose config does not have the token of masked positions."""
    from specforge.modeling.draft.peagle import PEagleDraftModel

    config = LlamaConfig(**SIZES | {"num_hidden_layers": 3}, draft_vocab_size=DRAFT_VOCAB, pad_token_id=0)
    model = PEagleDraftModel(config).eval()
    randomize(model)
    model.t2d, model.d2t = maps(DRAFT_VOCAB)
    model.save_pretrained(out)


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
    """Write every head, and the logits of a draft in `tandem-dflash`, if it is there."""
    if (out / "tandem-dflash").is_dir():
        read_dflash(out / "tandem-dflash")
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
    deep = SIZES | {"num_hidden_layers": 3}
    write_p_eagle(out / "speculators-p-eagle", LlamaConfig(**deep), norm_before_residual=True, **listed)
    write_p_eagle(out / "speculators-p-eagle-3.1", Qwen3Config(**deep), fc_norm=True, **five)
    write_specforge_p_eagle(out / "specforge-p-eagle")
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "use_sliding_window": True}
    write_dflash(out / "speculators-dflash", DRAFT_VOCAB, **windows)
    write_dflash(out / "speculators-dflash-whole", VOCAB)
    write_dflash(out / "speculators-dflash-anchor", VOCAB, {"sample_from_anchor": True})
    write_specforge_dflash(out / "specforge-dflash")
    for kind in ("vanilla", "gated", "rnn"):
        fields = {"markov_rank": RANK, "markov_head_type": kind, "sample_from_anchor": kind != "gated"}
        write_dflash(out / f"speculators-dspark-{kind}", DRAFT_VOCAB if kind == "rnn" else VOCAB, fields)
        write_specforge_dspark(out / f"specforge-dspark-{kind}", kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
