"""Where weights come from: a source string -> a checked `Checkpoint`, a folder in Hugging Face layout.

One file per kind of source. Reads headers and configs; only `values.py` reads values of weights, and imports torch.
Entered by every room above.
"""
