"""How the classic plugin finds and loads what was compiled before, and what it does where it finds nothing."""

import os

from neuronx_distributed_inference.models.llama.modeling_llama import NeuronLlamaForCausalLM
from neuronx_distributed_inference.models.qwen3.modeling_qwen3 import NeuronQwen3ForCausalLM
from transformers import AutoConfig, AutoTokenizer

CLASSES = {"LlamaForCausalLM": NeuronLlamaForCausalLM, "Qwen3ForCausalLM": NeuronQwen3ForCausalLM}


class NeuronCausalLM:
    def load_weights(self, model_name_or_path, speculative_model):
        """True if precompiled artifacts were loaded; False if it would now compile into their folder."""
        config = AutoConfig.from_pretrained(model_name_or_path)
        AutoConfig.from_pretrained(speculative_model)
        self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
        application = CLASSES[config.architectures[0]]
        path = os.environ["NEURON_COMPILED_ARTIFACTS"]
        try:
            self.model = application(path)
            self.model.load(path)
        except (FileNotFoundError, ValueError) as error:
            self.reason = str(error)
            return False
        return True
