"""Configs of new drafts."""

from pipeline.distill.head import head_config
from pipeline.models.families import config_of
from pipeline.sources.pair import resolve
from support.checkpoints import CONFIG, random_weights, write_checkpoint


def test_head_config_has_the_sizes_of_a_target_that_leaves_them_to_its_family(tmp_path):
    """Was: absent fields took the defaults of Llama, the head's family: 2048 positions for a Mistral target."""
    config = {"model_type": "mistral", "num_attention_heads": 16, "num_key_value_heads": 8}
    write_checkpoint(tmp_path / "m", random_weights(CONFIG | config), **config)
    text = (tmp_path / "m" / "config.json").read_text()
    for absent in ('"max_position_embeddings": 128, ', '"num_key_value_heads": 8, '):
        assert absent in text
        text = text.replace(absent, "")
    (tmp_path / "m" / "config.json").write_text(text)
    target = resolve(str(tmp_path / "m"), base=tmp_path, cache=tmp_path / "cache")
    head = config_of(head_config(target, 32, (0, 1, 1)) | {"eagle_config": {}}, "head")
    assert (head.max_position, head.kv_heads) == (131072, 8)
    assert (head.head_dim, head.norm_eps) == (target.config.head_dim, target.config.norm_eps)
