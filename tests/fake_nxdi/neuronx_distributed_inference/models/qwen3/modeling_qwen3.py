from neuronx_distributed_inference.models.application_base import NeuronApplicationBase


class NeuronQwen3Model:
    pass


class NeuronQwen3ForCausalLM(NeuronApplicationBase):
    _model_cls = NeuronQwen3Model
