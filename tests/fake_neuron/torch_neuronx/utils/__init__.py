from torch_neuronx.utils.utils import SUPPORTED_TYPES, get_platform_target

__all__ = ["SUPPORTED_TYPES", "get_hardware", "get_platform_target"]


def get_hardware(*arguments):
    return get_platform_target()
