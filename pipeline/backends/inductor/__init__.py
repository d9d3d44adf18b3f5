"""AOTInductor: C++ kernels, one shared library per graph. Runs on any CPU; on CUDA not run.

    backend.py                  the backend: trace, compile, open
    seams.py                    this backend's seams of the models
    subgraphs.py                    functions that graphs call often, traced once
    program.py                  a phase as a list of calls of subgraphs
    subgraph_objects.py             compile a subgraph to an object file
    driver.py                   C++ that calls the subgraphs, linked with them
    block_linear.py             a few rows times a blocked weight, as an operator
    block_linear_kernel.py      its C++: products with a block
    block_rows_kernel.py        its C++: loops over blocks and the rows that are live
    cached_attention.py         attention over the keys in the cache, as an operator
    cached_attention_kernel.py  its C++
    sample_all.py               sampling from a whole vocabulary, as an operator
    sample_all_kernel.py        its C++
    vectors.py                  C++ that the kernels share
    collectives.py              sums and gathers over ranks
    compiler.py                 the C++ compiler of `CXX`, and the words for its failures
    scratch.py                  Inductor's folders, headers and checks
    ranks.py                    all ranks of an artifact; more than one run in processes of their own
    session.py                  one rank: its weights, its state, its graphs
    just_in_time.py             the same kernels without an artifact, for `distill`

Weights and state are inputs of a graph, so nothing is baked in and graphs share both without a copy. A linear weight
[N, I] is stored in blocks and multiplied by `block_linear`, whose kernel streams it near memory bandwidth for one row
and for a handful alike.

Independent of requests, text and gates. Imports no other backend.
Entered through `backends.base`; `distill` takes `just_in_time`.
"""
