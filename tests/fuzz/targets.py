"""What parses outside input, as functions from bytes to nothing: one table for the fast tests and for `make fuzz`.

A target may raise a `TandemError` and nothing else. Its seeds are in a folder of its name in
`tests/fuzz/corpus/`: those named `valid*` are accepted without an error, the others were found by `make fuzz`.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import TandemError

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MEMORY = Path("/dev/shm")

Parse = Callable[[bytes], object]
Prepare = Callable[[Path], Parse]
"""Makes a target's function, once for each process; it may write into an empty folder."""


@dataclass(frozen=True)
class Target:
    """A parser: `form` is that of its input, for mutations of its structure (`fuzz.mutations`)."""

    name: str
    form: str
    module: str
    about: str

    def prepare(self, folder: Path) -> Parse:
        """Return the function that reads one input; imports what it needs."""
        module = importlib.import_module(f"fuzz.{self.module}")
        prepare: Prepare = getattr(module, f"{self.name}_target")
        return prepare(folder)

    def seeds(self) -> list[Path]:
        """Return the files of the corpus."""
        return sorted(path for path in (CORPUS / self.name).glob("*") if path.is_file())


TARGETS = {
    name: Target(name, form, module, about)
    for name, form, module, about in (
        ("recipe", "yaml", "documents", "a recipe"),
        ("lock", "yaml", "documents", "the lock of a recipe, and the plan from it"),
        ("prompts", "lines", "documents", "prompts of gates and of training, transcripts"),
        ("traffic", "lines", "documents", "logs and histograms of lengths; the first byte chooses the suffix"),
        ("policy", "yaml", "documents", "a policy for signatures"),
        ("manifest", "json", "releases", "a manifest of any kind"),
        ("release", "json", "releases", "the document of a release: a manifest or an index of variants"),
        ("alias", "lines", "releases", "the text of an alias"),
        ("yank", "json", "releases", "the record of a yank"),
        ("provenance", "json", "releases", "a provenance statement, and a policy's check of its builder"),
        ("signature", "json", "releases", "a signature by model-signing"),
        ("pulled", "json", "releases", "the record of a pull"),
        ("promotion", "json", "releases", "the record of a release's promotions"),
        ("report", "json", "releases", "the report of the gates"),
        ("shared", "json", "releases", "an entry of the shared cache"),
        ("config", "json", "checkpoints", "`config.json` of a checkpoint"),
        ("head", "json", "checkpoints", "`config.json` of a draft, with the tensors of a head"),
        ("generation", "json", "checkpoints", "`generation_config.json`"),
        ("weight_map", "json", "checkpoints", "the index of sharded weights"),
        ("safetensors", "safetensors", "checkpoints", "the header of a file of weights, against a config"),
        ("quant_state", "json", "checkpoints", "the state of a 4-bit matrix of bitsandbytes"),
        ("gguf", "bytes", "checkpoints", "metadata, tensors and weights of a GGUF file"),
        ("tokenizer", "json", "checkpoints", "`tokenizer.json`, compared and used"),
        ("tokenizer_config", "json", "checkpoints", "`tokenizer_config.json` with a chat template"),
        ("pt2", "zip", "graphs", "the zip of a graph of the backend `inductor`"),
        ("neff", "zip", "graphs", "the zip of a graph of the backend `neuron`, with its NEFF"),
        ("signature_of_graph", "json", "graphs", "`io.json` of a graph"),
        ("operators", "lines", "graphs", "the output of `neuronx-cc list-operators`"),
        ("devices", "json", "graphs", "the output of `neuron-ls --json-output`, and of `neuron-ls` after a NUL"),
        ("vllm_settings", "json", "graphs", "`tandem-nxdi.json` of an artifact of NxD Inference"),
        ("hub", "answer", "servers", "answers of a Hub to a registry and to a source"),
        ("s3", "answer", "servers", "answers of an S3 server"),
        ("ranges", "answer", "servers", "answers of a server to reads of ranges"),
        ("oci", "answer", "registries", "answers of an OCI registry"),
        ("oci_manifest", "json", "registries", "manifests, indexes and records in an OCI registry"),
        ("login", "json", "registries", "the file of registry credentials"),
        ("archive", "bytes", "registries", "a file that `tandem load` loads"),
        ("request", "json", "requests", "a request to the server: messages, schema, extra arguments, options"),
        ("schema", "json", "requests", "the JSON schema of a request"),
        ("public_head", "json", "tools", "config and tensors of a head that a public tool wrote"),
        ("init", "json", "tools", "the config from which `tandem init` writes a recipe"),
        ("tokenizer_parts", "bytes", "tools", "older forms of a tokenizer; the first byte selects the file"),
        ("vllm_cache", "lines", "tools", "metadata, mark, command and kernel of a compile cache, with NULs between"),
    )
}


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a target's files, in memory if this host has such a disk."""
    return tempfile.TemporaryDirectory(prefix="tandem-fuzz-", dir=MEMORY if MEMORY.is_dir() else None)


def fault(parse: Parse, data: bytes) -> BaseException | None:
    """Return the undocumented error that an input raises, or None."""
    try:
        parse(data)
    except (TandemError, KeyboardInterrupt, SystemExit) as error:
        return None if isinstance(error, TandemError) else error
    except BaseException as error:  # a panic of a Rust library is a BaseException
        return error
    return None
