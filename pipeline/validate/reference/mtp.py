"""The reference of MTP modules: transformers' own layer and norms, over the output of transformers' target.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.models.weights import FC, FEATURE_NORM, NORM, TOKEN_NORM
from pipeline.validate.reference.eagle3 import FIRST, Eagle3Reference
from pipeline.validate.reference.layers import Recorder
from pipeline.validate.reference.routes import Router
from pipeline.validate.reference.skeleton import for_module


class MtpReference(Eagle3Reference):
    """The module of a target, in two precisions. Logits as those of an EAGLE-3 head."""

    @cached_property
    def _model(self) -> Any:
        return self.skeleton()

    def _head_states(self, tokens: list[int], taps_TX: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the input of the LM head at each token [T, H], and projections of keys and values."""
        model = self._model
        read = ((self.embed(tokens[1:]).to(kind), TOKEN_NORM), (taps_TX[:-1], FEATURE_NORM))
        both = torch.cat([self._normed_by(name, x_TH) for x_TH, name in read], dim=-1)
        run = Recorder(self.tapped(kind, tokens, None), Router(None))
        self.record(model, run, both @ self.read(FC, self._refs[FC]).to(kind).T)
        layer = self._layers[0]
        own = {n.removeprefix(FIRST): self.read(n, r) for n, r in self._refs.items() if n.startswith(FIRST)}
        state = for_module(layer.state_dict(), own, self.checkpoint.config)
        layer.load_state_dict({name: tensor.to(kind) for name, tensor in state.items()}, assign=True)
        out = layer(run.hidden, **run.options[0])
        last_TH = self._normed_by(NORM, (out[0] if isinstance(out, tuple) else out)[0])
        return torch.cat((last_TH.new_zeros(1, last_TH.shape[1]), last_TH)), torch.stack(run.cache.layers, dim=1)

    def _normed_by(self, name: str, x_TH: Tensor) -> Tensor:
        """Apply transformers' norm with a weight of that name."""
        self._norm.load_state_dict({"weight": self.read(name, self._refs[name]).to(x_TH.dtype)}, assign=True)
        normed: Tensor = self._norm(x_TH)
        return normed
