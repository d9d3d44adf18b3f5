"""Tandem: compile a target LLM and its draft ahead of time into one validated, versioned artifact.

The rooms, in the order of the pipeline. `docs/explanation/architecture.md` has every module and the order of imports.

    build.py      START HERE: the stages of a build, in order
    recipe/       the YAML file that a user writes -> a checked `Recipe`
    sources/      source strings -> checked `Checkpoint`s of target and draft
    plan/         recipe and model configs -> the graphs to compile, their cost, and the lock
    models/       decoders as pure functions; one file per family
    speculation/  the four phases of a pair: prefill, decode, speculate, score
    graphs/       what a graph is: spec, signature, arguments, layouts of weights
    backends/     toolchains that trace, compile and open graphs: inductor, neuron
    executors/    where compile jobs run
    stages/       the stages of a build: shard, compile, package
    cache/        compiled graphs and goldens by content, local and shared
    artifact/     the artifact on disk: manifest, verification, signatures, provenance
    validate/     references, gates and the report between a build and a release
    registry/     releases: publish, pull, copy, list, aliases
    stores/       registries as folder, S3 bucket or Hub
    runtime/      run an artifact: `load(folder)` returns an `Engine`
    serve/        vLLM over the graphs of an artifact
    measure/      benchmarks; the best K and buckets for a host
    distill/      train a draft
    proposal/     a first recipe for a target: draft, ranks, buckets, K
    nxdi/         NxD Inference and vLLM's Neuron plugins
    cli/          the command `tandem`
    files/        atomic and direct writes, JSON lines
    addresses.py  misspelt addresses, and servers in environment variables
    doctor.py     what this machine can build and run
    errors.py     every error that a user can fix
    extras.py     which extras are missing, and the command that installs them
    memory.py     memory of this machine or its container
    progress.py   callbacks for log lines and progress
    records.py    the base of all parsed records
    selftest.py   a trial of the Neuron backend on an instance
    threads.py    how long threads wait for each other before they sleep
"""

from pipeline.threads import bound_spinning

bound_spinning()  # before anything imports torch, which reads it

__version__ = "0.1.0"
