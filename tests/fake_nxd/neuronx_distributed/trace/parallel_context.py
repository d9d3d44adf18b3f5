from neuronx_distributed.parallel_layers.parallel_state import GROUP


class NxDParallelState:
    def __init__(self, world_size=1, rank=0, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
                 context_parallel_size=1, expert_model_parallel_size=1, lnc_size=None):  # fmt: skip
        if world_size % tensor_model_parallel_size:
            raise RuntimeError(f"{world_size=} is not divisible by {tensor_model_parallel_size=}")
        self.size = tensor_model_parallel_size

    def __enter__(self):
        GROUP["size"] = self.size
        return self

    def __exit__(self, *error):
        GROUP["size"] = None
