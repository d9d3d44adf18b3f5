import inspect
from collections import OrderedDict

from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.trace.model_builder_utils import ModelParamInfo, ProvidedArgInfo, TraceArtifacts
from torch_neuronx.xla_impl.trace import generate_hlo


class ModelBuilder:
    def __init__(self, model, weights_to_skip_layout_optimization=None):
        self.model = model
        self.trace_artifacts_collection = {}
        self.world_size = parallel_state.get_tensor_model_parallel_size()

    def trace(self, args=None, kwargs=None, tag=None, spmd=True):
        if not spmd:
            raise NotImplementedError("MPMD tracing is not currently supported")
        parameters = _parameters(self.model)
        provided = _provided(parameters, kwargs or {})
        inputs = OrderedDict((one.param_name, one.tensor) for one in provided)
        made = generate_hlo(
            self.model, inputs, inline_weights_to_neff=False, return_weights=False, output_aliased_tensor=False,
            cpu_backend=True, preserve_parameters=True, enable_aliasing=True, treat_inputs_as_kwargs=True,
        )  # fmt: skip
        self.trace_artifacts_collection[tag] = TraceArtifacts(
            made.hlo_module,
            made.metaneff,
            made.flattener,
            made.packer,
            made.weight_name_to_idx,
            set(),
            provided,
            parameters,
        )
        return self


def _parameters(model):
    found = []
    for name, one in inspect.signature(model.forward).parameters.items():
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            raise NotImplementedError("Methods with *args or **kwargs are not supported.")
        if one.default is not one.empty and one.default is not None:
            raise ValueError(f"Parameter '{name}' has a non-None default value: {one.default}.")
        found.append(ModelParamInfo(name, one.default is one.empty))
    return found


def _provided(parameters, kwargs):
    unknown = kwargs.keys() - {one.param_name for one in parameters}
    if unknown:
        raise ValueError(f"Found unexpected keys in kwargs: {unknown}.")
    missing = [one.param_name for one in parameters if one.is_positional and one.param_name not in kwargs]
    if missing or not kwargs:
        raise ValueError(f"Missing required parameters: {missing}.")
    return [
        ProvidedArgInfo(one.param_name, one.is_positional, kwargs[one.param_name])
        for one in parameters
        if one.param_name in kwargs
    ]
