"""The files of an artifact that servers read."""

import json

from pipeline.models.families import config_of
from support.small_artifacts import make

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_package_config_has_the_rotary_embedding_in_both_layouts(tmp_path):
    """Was: the source's own layout; servers with transformers 4.57 ignore `rope_parameters` and read theta 10000."""
    config = {"model_type": "llama", "rope_parameters": LLAMA3, "max_position_embeddings": 256}
    artifact = make(tmp_path / "out", tmp_path / "work", config=config)
    whole = LLAMA3 | {"original_max_position_embeddings": 256}
    for path in ("config.json", "tokenizer/config.json"):
        packed = json.loads((artifact.root / path).read_text())
        assert (packed["rope_theta"], packed["rope_scaling"], packed["rope_parameters"]) == (500.0, whole, whole)
        assert config_of(packed, path) == config_of(config, path)


def test_package_weights_and_graphs_are_links_to_the_cache(tmp_path):
    artifact = make(tmp_path / "out", tmp_path / "work")
    shards = {path.name + path.parent.name: path for path in (tmp_path / "work/shards").rglob("*.safetensors")}
    weights = list(artifact.root.rglob("weights/*/*"))
    assert len(weights) == len(shards) == 2
    for path in weights:
        assert path.samefile(shards[path.name + path.parent.name])
    cached = {path.stat().st_ino for path in (tmp_path / "work/cache").rglob("*") if path.is_file()}
    graphs = [artifact.root / entry.file for entry in artifact.manifest.graphs]
    assert {path.stat().st_ino for path in graphs} <= cached
