"""vLLM serves an artifact with the artifact's graphs, and compiles nothing. For vLLM 0.32's V1 engine; patches nothing.

    plugin.py       entry point: whether this process serves an artifact
    platform.py     vLLM's settings, from the manifest; rejects contradictions and unsupported requests
    arguments.py    vLLM's arguments that are wrong, or have no effect with an artifact; imports no vLLM
    settings.py     those values, our own options, and the check of the artifact; imports no vLLM
    worker.py       vLLM's worker: opens the artifact, executes the scheduler's steps
    parameters.py   vLLM's data and ours: sampling parameters, masks of grammars, log probabilities
    requests.py     the scheduler's requests in the slots of `runtime.batch`; imports no vLLM

Speculation and vLLM's scheduler: a fused step drafts and verifies by itself, so the worker has no draft tokens to
return. It returns K placeholders for each request; the scheduler makes room for them and counts emitted tokens as
accepted. Its metrics are therefore correct, and K may change from step to step. Where a request has rules, its drafts
are proposed one step earlier and returned: the scheduler keeps those that a grammar allows, and computes its masks.

Compiles and validates nothing.
Entered by cli, and by vLLM through the entry point `vllm.platform_plugins`.
"""
