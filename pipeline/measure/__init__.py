"""How fast an artifact is here: benchmarks, the K and the buckets that pay, transformers beside it. Gates nothing.

Runs artifacts through the runtime. Entered by cli and validate.
"""
