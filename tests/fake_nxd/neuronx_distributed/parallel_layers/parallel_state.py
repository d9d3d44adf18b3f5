"""The size of the tensor-parallel group; None outside of NxDParallelState."""

GROUP = {"size": None}


def get_tensor_model_parallel_size():
    if GROUP["size"] is None:
        raise AssertionError("intra_layer_model parallel group is not initialized")
    return GROUP["size"]


def get_tensor_model_parallel_replica_groups():
    return [list(range(get_tensor_model_parallel_size()))]
