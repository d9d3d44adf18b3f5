"""NxD Inference and vLLM's Neuron plugins: a recipe compiled by AWS's own library, and vLLM's compile caches.

Neither runs nor validates these artifacts.
Entered by cli.
"""
