from neuronx_distributed_inference.models.application_base import NeuronApplicationBase


class NeuronLlamaModel:
    pass


class NeuronLlamaForCausalLM(NeuronApplicationBase):
    _model_cls = NeuronLlamaModel
