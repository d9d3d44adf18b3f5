import torch


class NxDModel(torch.nn.Module):
    def __init__(
        self, world_size, start_rank=None, local_ranks_size=None, state_initializer=None, layout_transformer=None
    ):
        super().__init__()
        if (start_rank is None) != (local_ranks_size is None):
            raise AssertionError("start_rank and local_ranks_size are set together")
        self.world_size, self.local_ranks_size = world_size, local_ranks_size or world_size
        self.state_initializer = state_initializer
        self.model_params, self.routes, self.parts = [], {}, {}
        self.states, self.weights, self.loaded = [], [], False

    def add(self, key, trace_artifacts, compilation_artifacts):
        if self.model_params and self.model_params != trace_artifacts.model_params:
            raise AssertionError("The model provided appears to have a different signature than all other models.")
        self.model_params = trace_artifacts.model_params
        neff, meta = compilation_artifacts.get_neff_bytes(), trace_artifacts.metaneff.SerializeToString()
        model = torch.classes.neuron.SPMDModel(neff, meta, self.local_ranks_size, self.world_size)
        self.parts[key] = (model, trace_artifacts.flattener, trace_artifacts.packer)
        self.routes.setdefault(_route(trace_artifacts.provided_args), []).append(key)
        return self

    def set_weights(self, sharded_checkpoint):
        if self.loaded:
            raise ValueError("set_weights() was called when the model was already loaded on neuron.")
        self.weights = torch.ops.neuron._parallel_load(sharded_checkpoint)

    def to_neuron(self):
        if self.state_initializer is not None:
            self.states = self.state_initializer()
        for model, _, _ in self.parts.values():
            model.initialize(self.states, self.weights, 0)
        self.loaded = True

    def read_from_neuron_buffer(self, buffer_key, rank):
        if not self.loaded:
            raise AssertionError("Model must be loaded on neuron before calling these methods")
        return self.states[rank][buffer_key].clone()

    def write_to_neuron_buffer(self, tensor, buffer_key, rank):
        if not self.loaded:
            raise AssertionError("Model must be loaded on neuron before calling these methods")
        buffer = self.states[rank][buffer_key]
        if buffer.shape != tensor.shape:
            raise KeyError(f"Cannot write tensor of shape {tensor.shape} to neuron buffer with shape {buffer.shape}")
        buffer.copy_(tensor)

    def forward(self, *args, model_name=None, forward_mode="default", **kwargs):
        if not self.loaded:
            raise RuntimeError("Model not initialized. Call set_weights() followed by to_neuron()")
        ordered = [(one.param_name, kwargs[one.param_name]) for one in self.model_params if one.param_name in kwargs]
        if len(ordered) != len(kwargs):
            raise AssertionError("Not all kwargs were parsed")
        fits = self.routes[str([(name, list(tensor.shape)) for name, tensor in ordered])]
        if model_name not in fits and (model_name is not None or len(fits) > 1):
            raise AssertionError(f"model_name {model_name} is none of the routes {fits}")
        model, flattener, packer = self.parts[model_name or fits[0]]
        return packer(model.forward(flattener([tensor for _, tensor in ordered])))


def _route(provided):
    return str([(one.param_name, list(one.tensor.shape)) for one in provided])
