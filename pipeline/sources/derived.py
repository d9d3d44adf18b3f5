"""A draft of its target's own files: some layers under new numbers, or the MTP module. Copies nothing."""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import SourceError
from pipeline.models import mtp
from pipeline.models.families import config_of
from pipeline.models.layer_types import of_layers
from pipeline.models.weights import FC
from pipeline.sources.checkpoint import Checkpoint, with_shared_embedding
from pipeline.sources.weights import weights

LAYERS = "draft.derive.layers"
"""The recipe's key."""


MTP = "draft.derive.mtp"
"""The recipe's key of a target's MTP module."""


def derive_mtp(target: Checkpoint, where: str = MTP) -> Checkpoint:
    """Return the draft that is the MTP module inside a target, with the target's embedding and head.

    Raises:
        SourceError: a target without a module, or whose modules are not read.

    """
    config_json = mtp.of_target(target.config_json, where)
    draft = replace(
        target,
        config=config_of(config_json, where),
        config_json=config_json,
        revision=f"{target.revision}#mtp",
    )
    if FC not in weights(draft):
        what = f"the target's files have no MTP module: no tensor {mtp.PREFIX}{FC}"
        raise SourceError(what, where=where, fix="use a checkpoint with the module, or another draft")
    return draft


def derive(target: Checkpoint, layers: tuple[int, ...], where: str = LAYERS) -> Checkpoint:
    """Return the draft whose layer i is the target's layer `layers[i]`, with the target's embedding and head.

    `where` names the layers in errors.

    Raises:
        SourceError: no layers, or a layer that the target does not have.

    """
    count = target.config.layers
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong or not layers:
        what = f"the target has no layer {wrong[0]}" if wrong else "no layers"
        raise SourceError(what, where=where, fix=f"use layers of 0..{count - 1}, for example [0, 1, {count - 1}]")
    if target.config.layer_input is not None:
        what = f"hidden_size_per_layer_input={target.config.layer_input}: layers with inputs make no draft of their own"
        raise SourceError(what, where=where, fix="use a smaller model of the family, or train a head: tandem distill")
    if sharing := [layer for layer in layers if target.config.layer(layer).shares_keys]:
        what = f"layer {sharing[0]} shares keys and values of layer {target.config.keys_of(sharing[0])}"
        raise SourceError(what, where=where, fix=f"use layers below {len(target.config.keeping)}")
    config_json = target.config_json | of_layers(target.config, target.config_json, layers)
    draft = replace(
        target,
        config=config_of(config_json, where),
        config_json=config_json,
        revision=f"{target.revision}#layers={','.join(map(str, layers))}",
        layers=layers,
    )
    return with_shared_embedding(draft)
