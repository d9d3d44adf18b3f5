"""NxD Inference and vLLM's Neuron plugins: the same recipe, compiled by AWS's own library, and its caches as artifacts.

Tandem does not run or validate what it makes here. Entered by cli.
"""
