from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class ModelParamInfo:
    param_name: str
    is_positional: bool


@dataclass
class ProvidedArgInfo:
    param_name: str
    is_positional: bool
    tensor: torch.Tensor


@dataclass
class TraceArtifacts:
    hlo: Any
    metaneff: Any
    flattener: Any
    packer: Any
    weight_name_to_idx: dict
    weight_names_to_skip: set
    provided_args: list
    model_params: list
