"""AOTInductor: torch.export, C++ kernels, one shared library per graph. Runs everything for real on any machine.

    seams.py                blocked weights and collectives: what the models' seams are filled with
    collectives.py          sums and gathers over ranks
    backend.py              the backend: trace, compile, load
    scratch.py              Inductor's folders, headers and checks
    block_linear.py         a few rows times a blocked weight: what it computes
    block_linear_kernel.py  the C++ that this becomes

Weights and state are inputs of a graph, so nothing is baked in and graphs share both without a copy.

Blocked weights: a linear weight [N, I] is stored as [N/32, I, 32] and multiplied by `block_linear`, whose kernel
streams it near memory bandwidth for one row and for a handful alike.
"""
