"""References equal transformers, are cached by content, and need the memory of a layer rather than of a model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

from pipeline.artifact import host
from pipeline.cache.local import Cache
from pipeline.measure.hf_model import build_model
from pipeline.models.eagle3 import taps_of
from pipeline.progress import no_log
from pipeline.sources.derived import derive
from pipeline.sources.pair import resolve
from pipeline.sources.remote import RemoteFile
from pipeline.validate.reference import products
from pipeline.validate.reference.golden import project_cache
from pipeline.validate.reference.goldens import Goldens
from pipeline.validate.reference.layers import Reference, Taps
from support.checkpoints import write_checkpoint

SEQUENCE = [5, 60, 7, 8, 300, 41, 7, 7, 19]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


def pico(sources: Path, location: str, role="target"):
    return resolve(f"pico://{location}", base=sources, cache=sources, role=role)


def check(checkpoint, target) -> None:
    """Baseline and noise against the whole model in transformers, in float64 and float32."""
    golden = next(Reference(checkpoint, target, "float32").goldens([SEQUENCE]))
    with torch.no_grad():
        for kind, part in ((torch.float64, golden.baseline), (torch.float32, golden.noise)):
            model = build_model(checkpoint, target, "float32", "sdpa").to(kind)
            wanted = model(torch.tensor([SEQUENCE])).logits[0]
            close = 1e-10 if kind == torch.float64 else 1e-4
            torch.testing.assert_close(part.values.to(kind), wanted.gather(-1, golden.ids.long()), rtol=0, atol=close)
            assert part.best.tolist() == wanted.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_reference_equals_transformers(sources, family):
    target = pico(sources, family)
    check(target, target)


def test_goldens_name_the_model_that_runs(sources, tmp_path):
    """A build logged the same line twice, for the target and for the draft."""
    target, said = pico(sources, "llama"), []
    cache = Cache(tmp_path, "goldens")
    for checkpoint in (target, derive(target, (0,))):
        Goldens(checkpoint, target, "float32", cache, said.append).of([SEQUENCE])
    assert said == [f"  reference of the {role}: 1 sequences, layer by layer" for role in ("target", "draft")]


def test_reference_of_a_derived_draft(sources):
    target = pico(sources, "llama")
    check(derive(target, (2, 0)), target)


def test_reference_of_a_draft_with_a_reduced_vocabulary(sources):
    target = pico(sources, "llama")
    check(pico(sources, "llama?draft_vocab=128", "draft"), target)


def test_caches_are_those_of_transformers(sources):
    target = pico(sources, "qwen3")
    golden = next(Reference(target, target, "bfloat16").goldens([SEQUENCE]))
    model = transformers.AutoModelForCausalLM.from_pretrained(target.root, dtype=torch.bfloat16)
    with torch.no_grad():
        kept = model(torch.tensor([SEQUENCE]), use_cache=True)[1]
    for layer in range(target.config.layers):
        keys, values = kept.layers[layer].keys[0], kept.layers[layer].values[0]
        assert torch.equal(golden.caches_noise[:, layer, 0], project_cache(keys))
        assert torch.equal(golden.caches_noise[:, layer, 1], project_cache(values))


def test_golden_of_a_beginning_is_the_beginning_of_the_golden(sources):
    target = pico(sources, "llama")
    whole, part = Reference(target, target, "float32").goldens([SEQUENCE, SEQUENCE[:4]])
    cut = whole.cut(4)
    assert torch.equal(cut.ids, part.ids)
    torch.testing.assert_close(cut.baseline.values, part.baseline.values, rtol=0, atol=1e-10)
    torch.testing.assert_close(cut.caches, part.caches)


def test_goldens_are_cached_by_content(sources, tmp_path):
    target = pico(sources, "llama")

    def goldens(dtype, sequences):
        source = Goldens(target, target, dtype, Cache(tmp_path, "goldens"), lambda line: None)
        source.of(sequences)
        return source.computed, source.cached

    other = [*SEQUENCE[:-1], 20]
    assert goldens("float32", [SEQUENCE]) == (1, 0)
    assert goldens("float32", [SEQUENCE, other]) == (1, 1)
    assert goldens("bfloat16", [SEQUENCE]) == (1, 0)
    assert goldens("float32", [SEQUENCE, other]) == (0, 2)


@pytest.mark.slow
def test_reference_needs_a_layer_in_memory_not_the_model(tmp_path):
    """A model of 1.1 GB of float32 in 24 layers: what a reference adds stays below 0.4 GB, its float64 included."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 24, "num_attention_heads": 16}
    write_checkpoint(tmp_path / "model", files=4, **sizes, num_key_value_heads=4, head_dim=64)
    code = (
        "import json, resource, sys; from pathlib import Path; from pipeline.sources.pair import resolve\n"
        "from pipeline.validate.reference.layers import Reference\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "root = Path(sys.argv[1]); target = resolve('./model', base=root, cache=root)\n"
        "reference = Reference(target, target, 'float32')\n"
        "before = peak(); list(reference.goldens([list(range(3, 40))] * 3))\n"
        "print(json.dumps([before, peak(), sum(d.size for d in target.files.values())]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after, size = json.loads(done.stdout)
    assert size > 1.0e9
    assert after - before < 0.4e9, f"{(after - before) / 1e9:.2f} GB for a model of {size / 1e9:.2f} GB"


def test_a_head_reads_the_states_of_the_targets_own_run(sources, tmp_path, monkeypatch):
    """The target ran twice over every sequence: for its own goldens, and for its head's."""
    target, head = pico(sources, "llama"), pico(sources, "llama?draft_vocab=128&eagle3=1", "draft")
    ran: list[str] = []
    original = Reference.run_layers
    monkeypatch.setattr(Reference, "run_layers", lambda self, s, e: ran.extend("x" for _ in s) or original(self, s, e))
    taps = Taps(taps_of(target.config, head.config))
    both = [
        Goldens(of, target, "bfloat16", Cache(tmp_path / "a", "goldens"), no_log, taps=taps) for of in (target, head)
    ]
    goldens = [source.of([SEQUENCE]) for source in both]
    assert len(ran) == 1
    again = Goldens(head, target, "bfloat16", Cache(tmp_path / "c", "goldens"), no_log, narrow="int8", taps=taps)
    again.of([SEQUENCE])  # as of a head in int8, whose effect is compared with the head
    assert len(ran) == 1
    alone = Goldens(head, target, "bfloat16", Cache(tmp_path / "b", "goldens"), no_log)
    assert torch.equal(alone.of([SEQUENCE])[0].baseline.values, goldens[1][0].baseline.values)
    assert len(ran) == 2


def test_products_are_wide_where_the_processor_has_no_instructions(monkeypatch):
    """By the kernel's flags: the torch of Neuron hosts (2.9) lists no capabilities."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for flags, wide in (({"avx2"}, {torch.bfloat16, torch.float16}), ({"avx512_bf16"}, {torch.float16})):
        monkeypatch.setattr(host, "processor_flags", lambda *_, flags=flags: frozenset(flags))
        assert products.WideProducts().dtypes == wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_float32_round_once(dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((1, 5, 64), (32, 64), (32,)))
    with products.WideProducts() as wide:
        wide.dtypes = {dtype}  # as on a CPU without instructions for it
        results = functional.linear(x, weight, bias), x @ weight.T
        assert (x.double() @ weight.T.double()).dtype == torch.float64
    exact = x.double() @ weight.T.double()
    assert torch.equal(results[0], (x.float() @ weight.float().T + bias.float()).to(dtype))
    assert torch.equal(results[1], (x.float() @ weight.float().T).to(dtype))
    assert (results[1].double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_golden_of_weights_without_a_digest_has_their_revision_in_its_key(sources, tmp_path):
    """S3 lists no sha256: goldens of weights that were replaced there were those of the weights before."""
    target = pico(sources, "llama")
    file = next(name for name in target.files if name.endswith(".safetensors"))
    listed = {name: digest for name, digest in target.files.items() if name != file}
    remote = {file: RemoteFile(file, 1, file, lambda offset, buffer: 0)}

    def key(revision: str) -> str:
        checkpoint = replace(target, files=listed, remote=remote, revision=revision)
        return Goldens(checkpoint, checkpoint, "float32", Cache(tmp_path, "goldens"), lambda line: None)._key([1, 2])

    assert key("etag-1") != key("etag-2")
    assert key("etag-1") == key("etag-1")
