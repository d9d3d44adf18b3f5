"""vLLM serves an artifact: its graphs do the work, nothing is compiled. For vLLM 0.32's V1 engine; patches nothing.

    plugin.py       entry point: is this process about to serve one of our artifacts?
    platform.py     vLLM's settings, from the manifest; contradictions and unsupported requests refused
    settings.py     those values, our own options, and the check of the artifact; imports no vLLM
    worker.py       the worker vLLM drives: opens the artifact, executes its scheduler's steps
    requests.py     the scheduler's requests in the slots of `runtime.batch`; imports no vLLM

Speculation and vLLM's scheduler. A fused step drafts and verifies by itself, so there are no draft tokens to hand over.
The worker hands over K placeholders for each request; the scheduler makes room for them, and counts what of them
came back as accepted. So its own metrics are true, and K may change from step to step.
"""
