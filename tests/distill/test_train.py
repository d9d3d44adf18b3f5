"""The arithmetic of training."""

import math
import re
from dataclasses import replace

import pytest
import torch

from pipeline.artifact import host
from pipeline.distill import train
from pipeline.distill.block import block_training
from pipeline.distill.data import Conversation
from pipeline.models.eagle3 import fitted, opened_config, tensor_name
from pipeline.models.families import config_of
from pipeline.models.weights import EMBEDDING, HEAD
from pipeline.speculation.block_chains import guesses
from pipeline.speculation.chains import Batch
from support.heads import SIZES
from support.parallel_drafts import DFLASH, DSPARK, dflash_tensors


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cpu", {"avx2", "avx512f"}, False),
        ("cpu", {"avx2", "avx512_bf16"}, True),
        ("cpu", {"asimd", "bf16"}, True),
        ("cuda", set(), True),
    ],
)
def test_training_multiplies_bfloat16_where_the_processor_can(monkeypatch, device, flags, expected):
    """It always did, and was 20 times slower on processors that emulate it."""
    monkeypatch.setattr(host, "processor_flags", lambda *_: frozenset(flags))
    assert train.has_bfloat16(device) is expected


TARGET = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 3}, "target")
LOSS = re.compile(r"step (\d+) of 60, loss ([\d.]+)")


def draft_of(config, markov=None):
    """A draft over three layers with random weights: its config, and its weights with the target's tables."""
    tensors = dflash_tensors(markov=markov)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    options = config["dflash_config"] | ({"markov_head_type": markov} if markov else {})
    draft = fitted(TARGET, config_of(opened_config(config | {"dflash_config": options}, shapes, {}), "draft"))
    drawn = torch.randn(2, 512, 64, generator=torch.Generator().manual_seed(1))
    named = {tensor_name(name): tensor for name, tensor in tensors.items()}
    return draft, named | {EMBEDDING: drawn[0], HEAD: drawn[1] * 0.1}


def conversation(seed, length=24, prompt=6):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 500, (length,), generator=generator, dtype=torch.int32)
    states = torch.randn(length - 1, 3 * 64, generator=generator)
    return Conversation(tokens, prompt, states[:, :128], states[:, 128:])


def trainer_of(folder, lines, **how):
    config, weights = draft_of(DFLASH)
    settings = train.TrainingSettings(steps=60, batch_tokens=64, warmup=5, objective="token", bfloat16=False)
    tables = train.TargetTables(weights.pop(EMBEDDING), weights[HEAD].clone(), torch.arange(512))
    draft = train.InitialDraft(guesses, config, weights)
    return train.Trainer(draft, tables, replace(block_training(settings), **how), folder, lines)


def test_training_a_dflash_draft_lowers_the_loss_and_goes_on_after_a_kill(tmp_path):
    """Few sequences are learned by heart; weights after a kill at step 50 are those of an undisturbed run."""
    data, lines = [conversation(seed) for seed in range(2)], []
    whole = trainer_of(tmp_path / "whole", lines.append, anchors=4)
    whole.train(data, [])
    losses = [float(found[2]) for line in lines if (found := LOSS.match(line))]
    assert len(losses) == 2
    assert losses[1] < 0.8 * losses[0] < 0.8 * math.log(512)
    assert min(whole.accuracy(data).given_previous) > 0.8
    assert max(trainer_of(tmp_path / "new", lines.append).accuracy(data).given_previous) < 0.5

    def killed(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "killed", killed, anchors=4).train(data, [])
    again = trainer_of(tmp_path / "killed", lines.append, anchors=4)
    assert again.step == 50
    again.train(data, [])
    for name, tensor in whole.export().items():
        assert torch.equal(tensor, again.export()[name]), name


def test_answers_shorter_than_a_block_leave_finite_weights(tmp_path):
    """No position has a seventh draft token to learn; the mean of none was NaN, and so were all weights after it."""
    lines = []
    trainer = trainer_of(tmp_path, lines.append, steps=2)
    trainer.train([conversation(seed, length=11) for seed in range(2)], [])
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.export().values())
    assert "nan" not in lines[-1]


def batch_of(length=20, rows=2):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 500, (rows, length + 1), generator=generator)
    learn = torch.ones(rows, length, dtype=torch.bool)
    learn[:, :4] = False  # the prompt
    learn[1, 14:] = False  # padding
    return Batch(tokens, torch.randn(rows, length, 128, generator=generator), torch.zeros(rows, length, 64), learn)


def test_blocks_begin_at_random_where_there_is_something_to_learn():
    """The same ones for the same seed, so that a run that was killed goes on as it would have."""
    batch = batch_of()
    one, again, other = (train.with_anchors(batch, 50, seed) for seed in (1, 1, 2))
    assert torch.equal(one.begins_BA, again.begins_BA)
    assert not torch.equal(one.begins_BA, other.begins_BA)
    assert one.begins_BA.shape == (2, 50)
    assert set(one.begins_BA[0].tolist()) == set(range(3, 19)), "answers are tokens 5 to 20"
    assert set(one.begins_BA[1].tolist()) <= set(range(3, 13))
    assert train.with_anchors(batch, 0, 1) is batch
    empty = train.with_anchors(replace(batch, learn_BT=torch.zeros_like(batch.learn_BT)), 4, 1)
    assert empty.begins_BA.shape == (2, 4)


@pytest.mark.parametrize(("config", "markov"), [(DFLASH, None), (DSPARK, "rnn")])
def test_blocks_at_some_positions_answer_as_those_at_all_do(config, markov):
    """At every depth, in every sequence."""
    draft, weights = draft_of(config, markov)
    batch = batch_of()
    some = train.with_anchors(batch, 6, 3)
    for whole, part in zip(guesses(draft, weights, batch, 4), guesses(draft, weights, some, 4), strict=True):
        of = {
            (row, at): logits
            for row, at, logits in zip(whole.rows_M.tolist(), whole.began_M.tolist(), whole.logits_MV, strict=True)
        }
        assert len(part.rows_M) > 6
        assert torch.equal(part.positions_M - part.began_M, (whole.positions_M - whole.began_M)[: len(part.rows_M)])
        for row, at, logits in zip(part.rows_M.tolist(), part.began_M.tolist(), part.logits_MV, strict=True):
            torch.testing.assert_close(logits, of[row, at], atol=1e-4, rtol=1e-4)
