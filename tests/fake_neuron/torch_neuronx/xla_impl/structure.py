"""Order of arguments and results around a compiled graph; plain attributes, which NxDModel saves as text."""

import torch


class Flattener(torch.nn.Module):
    def __init__(self, layout, exclude=None):
        super().__init__()
        self.layout, self.exclude = layout, exclude

    def forward(self, inputs):
        return [inputs[place] for place in self.layout if place not in (self.exclude or [])]


class Packer(torch.nn.Module):
    def __init__(self, layout, identifiers=None, constants=None):
        super().__init__()
        self.layout, self.identifiers, self.constants = layout, identifiers, constants

    def forward(self, outputs):
        return tuple(outputs[place] for place in self.layout)


def extract(structure):
    return structure, None, None
