"""Where weights come from: a source string -> a checked `Checkpoint`, a folder in Hugging Face layout.

One file per kind of source. Reads headers and configs; only `values.py` and `dequantise.py` handle values of weights,
and import torch.
Entered by every room above.
"""
