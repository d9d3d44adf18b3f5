"""The configuration that NxD Inference is given, read by its real classes: `make test-xla` with both sources.

TANDEM_NXD_SOURCE and TANDEM_NXDI_SOURCE name the `src` folders of aws-neuron/neuronx-distributed (release 2.29) and of
aws-neuron/neuronx-distributed-inference.
"""

import json
import os
from pathlib import Path

import pytest

from pipeline.nxdi import config as nxdi
from pipeline.nxdi.compile import CompileOrder
from pipeline.plan.lock import lock_path, pair_configs
from pipeline.plan.lock import read as read_lock
from pipeline.plan.plan import make_plan
from pipeline.recipe import find, load
from support.neuron_lane import NXD, NXD_SOURCE, environment, run
from support.paths import ROOT

pytestmark = pytest.mark.xla

NXDI = os.environ.get("TANDEM_NXDI_SOURCE")
ASK_NXDI = """
import json
from pathlib import Path
from neuronx_distributed_inference.models.config import CONFIG_FILE, FusedSpecNeuronConfig, InferenceConfig
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config
from pipeline.nxdi import config as nxdi
from pipeline.nxdi.compile import CompileOrder
asked = CompileOrder.parse(Path({request!r}).read_bytes())
def config(settings, checkpoint):
    neuron = InferenceConfig.get_neuron_config_cls()(**settings)
    return InferenceConfig(neuron, load_config=load_pretrained_config(checkpoint))
made = config(asked.settings.neuron_config, asked.target)
draft = config(asked.settings.draft_neuron_config, asked.draft)
made.fused_spec_config = FusedSpecNeuronConfig(dict, draft_config=draft, draft_model_path=asked.draft)
made.save(asked.out)
written = json.loads(Path(asked.out, CONFIG_FILE).read_text())
packed = nxdi.relative(written, {{asked.target: "models/target", asked.draft: "models/draft"}})
Path(asked.out, CONFIG_FILE).write_text(json.dumps(packed))
again = InferenceConfig.load(asked.out)
print(json.dumps({{
    "different": nxdi.differences(asked.settings, written), "file": CONFIG_FILE,
    "unknown": nxdi.differences(asked.settings, {{"neuron_config": {{}}}})[:1],
    "places": [again._name_or_path, again.fused_spec_config.draft_model_path],
    "loaded": [again.neuron_config.speculation_length, again.neuron_config.tp_degree,
               again.fused_spec_config.draft_config.neuron_config.tp_degree],
    "absolute": asked.out in json.dumps(packed) or asked.target in json.dumps(packed)}}))
"""


@pytest.mark.skipif(not (NXD_SOURCE and NXDI), reason="needs TANDEM_NXD_SOURCE and TANDEM_NXDI_SOURCE")
def test_nxd_inference_takes_the_configuration_as_it_is_asked(tmp_path):
    """The real configuration classes of NxD Inference: every key is known, and the file is loaded with places in it."""
    path = find("llama-70b-spec", ROOT / "recipes")
    recipe, pinned = load(path), read_lock(lock_path(path))
    greedy = recipe.speculation.model_copy(update={"sampling": ("greedy",), "candidates": None})
    recipe = recipe.model_copy(update={"speculation": greedy})
    for role, source in (("target", pinned.target), ("draft", pinned.draft)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps(source.config))
    made = nxdi.settings(make_plan(recipe, *pair_configs(recipe, pinned, str(path))))
    places = [str(tmp_path / name) for name in ("target", "draft", "out", "flags")]
    (tmp_path / "request.json").write_bytes(CompileOrder(made, *places).dump())
    where = environment(nxd=[*NXD, Path(NXDI)], NEURON_PLATFORM_TARGET_OVERRIDE="trn2")
    done = run(ASK_NXDI.format(request=str(tmp_path / "request.json")), where, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["different"] == []
    assert said["unknown"]
    assert said["file"] == nxdi.CONFIG
    assert said["places"] == ["models/target", "models/draft"]
    assert said["loaded"] == [7, 64, 1]
    assert not said["absolute"]
    warned = [line for line in done.stderr.splitlines() if "Unexpected keyword arguments" in line]
    assert not [name for line in warned for name in made.neuron_config if f"'{name}'" in line]  # it warns of its own
