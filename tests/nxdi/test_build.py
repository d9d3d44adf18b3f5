"""NxD Inference's package from recipe to vLLM, on the fakes of NxD Inference and of the plugin's loader."""

import json
import shutil

import pytest

from pipeline import runtime
from pipeline.artifact.verify import verify
from pipeline.errors import GateError, InputError
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import pull
from support.neuron_lane import FAKE_NXD, FAKE_NXDI, XLA, environment, run, tandem

pytestmark = pytest.mark.compile

RECIPE = """
name: tiny
target: {source: "pico://llama?layers=2", dtype: bfloat16}
draft: {source: "pico://llama?layers=1", placement: sharded, dtype: bfloat16}
speculation: {draft_tokens: [3], sampling: [greedy]}
shapes: {batch: [2], prefill: [16], kv: [48]}
parallel: {tensor: 2}
backend: {name: neuron, target: trn2, lnc: 2}
"""
LOAD = """
import json
from vllm_neuron.worker.neuronx_distributed_model_loader import NeuronCausalLM
from pathlib import Path
said = json.loads(Path("tandem-nxdi.json").read_text())["vllm"]["arguments"]
loader = NeuronCausalLM()
loaded = loader.load_weights(said["model"], said["speculative-config"]["model"])
fused = loader.model.config.fused_spec_config
ranks = [rank["rank_util.rank"].item() for rank in getattr(loader.model, "weights", [])]
print(json.dumps({"loaded": loaded, "reason": getattr(loader, "reason", None), "ranks": ranks,
    "speculation_length": loader.model.config.neuron_config.speculation_length,
    "draft": fused.draft_model_cls.__name__, "places": [loader.model.config._name_or_path, fused.draft_model_path],
    "words": loader.tokenizer("ab").input_ids}))
"""


def where(base, **more):
    found = environment(nxd=[FAKE_NXD, FAKE_NXDI], TANDEM_CACHE=str(base / "cache"), **more)
    return {name: value for name, value in found.items() if name != "BASE_COMPILE_WORK_DIR"}


def compile_tiny(base, out="out", *, recipe=RECIPE, **more):
    (base / "tiny.yaml").write_text(recipe)
    return tandem("nxdi", "tiny.yaml", out, "--compile", where=where(base, **more), cwd=base)


def load_in_vllm(folder, base):
    """Start what stands for vLLM inside a package, as the package itself says."""
    told = json.loads((folder / "tandem-nxdi.json").read_text())["vllm"]["environment"]
    code = f"import os; os.chdir({str(folder)!r})\n{LOAD}"
    done = run(code, where(base) | told)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def slow(*values):
    """A case of the slow lane: each is a build by NxD Inference."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("nxdi")
    done = compile_tiny(base, NEURON_FUSE_SOFTMAX="1")
    assert done.returncode == 0, done.stderr
    return base, base / "out"


def test_package_is_an_artifact_that_records_what_nxdi_does_not(packed):
    _, root = packed
    manifest = verify(root).manifest
    assert manifest.kind == "nxdi"
    assert manifest.requires == {"device": "neuron", "chip": "trn2", "lnc": "2"}
    assert manifest.toolchain["neuronx-distributed-inference"] == "0.9.17334"
    assert manifest.toolchain["neuronx-cc"] == "2.24.8799.0"
    assert manifest.backend.flags == {
        "env.NEURON_FUSE_SOFTMAX": "1",
        "env.XLA_FLAGS": XLA["XLA_FLAGS"],
        "neuronx-cc.context_encoding_model": "--auto-cast=none --lnc=2 -O1",
        "neuronx-cc.fused_speculation_model": "--auto-cast=none --lnc=2 -O1",
    }
    assert {"model.pt", "neuron_config.json", "weights/tp0_sharded_checkpoint.safetensors",
            "weights/tp1_sharded_checkpoint.safetensors", "models/target/tokenizer.json", "models/draft/config.json",
            "recipe.lock"} <= manifest.files.keys()  # fmt: skip
    provenance = json.loads((root / "provenance.json").read_text())["predicate"]["buildDefinition"]
    assert {one["name"].partition("/")[0] for one in provenance["resolvedDependencies"]} >= {"target", "draft"}
    asked = json.loads((root / "tandem-nxdi.json").read_text())
    assert asked["checkpoints"]["target"]["source"]["source"] == "pico://llama?layers=2"


def test_nothing_in_the_package_names_the_build_s_folders(packed):
    base, root = packed
    for path in root.rglob("*"):
        if path.is_file():
            assert str(base).encode() not in path.read_bytes(), path


def test_vllm_loads_the_package_where_it_is_pulled_to(packed, tmp_path):
    """Published, pulled elsewhere, its checkpoints gone: loaded as it is, nothing compiled again."""
    base, root = packed
    registry = str(tmp_path / "registry")
    with pytest.raises(GateError, match="has no validation gates"):
        publish(root, registry)
    publish(root, registry, ["latest"], PublishSettings(unvalidated=True))
    pulled = pull(f"{registry}/tiny@latest", tmp_path / "pulled", cache=tmp_path / "cache")
    shutil.move(base / "cache", base / "moved")
    try:
        said = load_in_vllm(pulled, base)
    finally:
        shutil.move(base / "moved", base / "cache")
    assert said["loaded"], said["reason"]
    assert said["ranks"] == [0, 1]
    assert said["speculation_length"] == 4
    assert said["draft"] == "NeuronLlamaForCausalLM"
    assert said["places"] == ["models/target", "models/draft"]
    assert said["words"]
    verify(pulled)  # loading left it as it was


def test_vllm_would_compile_again_where_a_rank_is_missing(packed, tmp_path):
    """Why a package with a part missing is refused when it is made: the plugin would not say so."""
    base, root = packed
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "weights/tp1_sharded_checkpoint.safetensors").unlink()
    assert not load_in_vllm(copy, base)["loaded"]


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        ("fail", "NxD Inference ended with status 1: neuronx-cc failed with 70"),
        slow("forget speculation_length", "neuron_config.speculation_length: expected 4, NxD Inference wrote None"),
        slow("no weights/tp1_sharded_checkpoint.safetensors", "wrote no weights/tp1_sharded_checkpoint.safetensors"),
        slow("uneven", "on rank 0 only"),
    ],
)
def test_what_nxd_inference_leaves_undone_is_refused(packed, fake, says):
    base, _ = packed
    done = compile_tiny(base, "refused", FAKE_NXDI=fake)
    assert done.returncode == 3, done.stderr
    assert says in done.stderr
    assert "fix: " in done.stderr
    assert not (base / "refused").exists()


def test_compile_needs_nxd_inference_and_a_recipe_that_it_can_do(packed):
    base, _ = packed
    without = {**where(base), "PYTHONPATH": environment()["PYTHONPATH"]}
    done = tandem("nxdi", "tiny.yaml", "none", "--compile", where=without, cwd=base)
    assert done.returncode == 3
    assert "not installed: neuronx-distributed-inference" in done.stderr
    done = compile_tiny(base, "none", recipe=RECIPE.replace("[greedy]", "[greedy, stochastic], candidates: 64"))
    assert done.returncode == 2
    assert "verifies draft tokens by argmax only" in done.stderr


def test_tandem_says_who_runs_a_package(packed):
    with pytest.raises(InputError, match="which only vLLM runs"):
        runtime.load(packed[1])
