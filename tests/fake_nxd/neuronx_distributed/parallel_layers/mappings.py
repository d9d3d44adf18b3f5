"""Collectives: torch-xla's where it is there, else by shape only (such a program can be traced, not run)."""

from importlib.util import find_spec

import torch

from neuronx_distributed.parallel_layers import parallel_state


def _groups():
    return [list(range(parallel_state.get_tensor_model_parallel_size()))]


def reduce_from_tensor_model_parallel_region(input_, process_group=None):
    if find_spec("torch_xla") is None:
        return input_ * len(_groups()[0])
    import torch_xla

    # `xm.all_reduce` leaves the operator out in a process that is alone, as a tracing one is.
    return torch_xla._XLAC._xla_all_reduce("sum", input_, 1.0, _groups(), False)


def gather_from_tensor_model_parallel_region(input_, process_group=None):
    if find_spec("torch_xla") is None:
        return torch.cat([input_] * len(_groups()[0]), dim=-1)
    import torch_xla.core.xla_model as xm

    return xm.all_gather(input_, dim=input_.dim() - 1, groups=_groups(), pin_layout=False)
