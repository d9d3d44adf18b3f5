from transformers import AutoConfig


def load_pretrained_config(model_path_or_name=None, hf_config=None):
    def load_config(self):
        config = AutoConfig.from_pretrained(model_path_or_name)
        found = config.to_dict()
        found.pop("dtype", None)
        found.pop("torch_dtype", None)
        vars(self).update(found)
        self._name_or_path = config._name_or_path

    return load_config
