"""Where weights come from: a source string -> a checked `Checkpoint`, a folder in Hugging Face layout.

One file a kind of source. Reads headers and configs. Only `values.py` reads values of weights, and imports torch.
"""
