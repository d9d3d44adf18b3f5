"""The seams of the Neuron backend, eagerly."""

import pytest
import torch

from pipeline.backends.neuron import module
from pipeline.backends.neuron.module import NeuronSeams, top_in_groups, with_booleans, without_booleans
from pipeline.graphs.packing import InOutPacking
from pipeline.graphs.signature import signature
from pipeline.models import blocks
from pipeline.models.parallel import Seams, attend_up_to
from support.neuron_graphs import arguments_of, phases
from support.pairs import make_pair


@pytest.mark.parametrize("kv", [0, 24])
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_in_blocks_equals_that_of_the_whole(monkeypatch, kv, rows):
    """A prompt's block reads the keys up to its own end; a pass over a cache reads all keys of its bucket."""
    monkeypatch.setattr(blocks, "SCORES_BYTES", 4 * rows * 4 * 40 * 6)
    monkeypatch.setattr(blocks, "SMALLEST_BLOCK", 4)
    assert len(blocks.query_blocks(rows * 4, 40, kv or 40)) > 3
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, 4, 40, 8, generator=generator)
    k, v = (torch.randn(rows + 1 if kv else rows, 2, 40, 8, generator=generator) for _ in "kv")
    last_BT = torch.randint(0, kv, (rows, 40), generator=generator) if kv else torch.arange(40)[None]
    attend = attend_up_to(last_BT, kv)
    torch.testing.assert_close(
        NeuronSeams(1).attend(q, k, v, attend), Seams().attend(q, k, v, attend), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "count", "most"), [(128_256, 256, 4096), (16_384, 256, 4096), (61, 16, 32), (40, 5, 9)]
)
def test_top_in_groups_is_that_of_the_whole_row(monkeypatch, size, count, most):
    """Equal scores by the smallest index, ids without a score last; no row is wider than the limit."""
    monkeypatch.setattr(module, "WIDEST_TOP", most)
    generator, widths = torch.Generator().manual_seed(size), []

    def top(rows_MN, k):
        widths.append(rows_MN.shape[1])
        values, indices = rows_MN.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]

    scores = torch.randint(-3, 9, (2, 3, size), generator=generator).float()
    scores[:, 0, count // 2 :] = -torch.inf
    values, indices = top_in_groups(scores, count, top)
    assert max(widths) <= max(most, 2 * count)
    assert len(widths) > 1
    wanted, wanted_indices = top(scores.flatten(0, 1), count)
    assert torch.equal(values.flatten(0, 1), wanted)
    assert torch.equal(indices.flatten(0, 1), wanted_indices)


@pytest.mark.parametrize("spec", phases(4), ids=lambda spec: spec.name)
def test_graphs_take_integers_in_place_of_booleans(spec):
    """`active` and `prompted`, which a phase gets as booleans again: the runtime has no type of one bit."""
    pair = make_pair("some").shape
    io = signature(spec, pair, InOutPacking())
    narrow = without_booleans(io)
    dtypes = {one.name: one.dtype for one in narrow.arguments}
    assert "bool" not in dtypes.values()
    logical = {one.name for one in io.arguments if one.dtype == "bool"}
    assert all(dtypes[name] == "int32" for name in logical)
    given = {
        name: torch.as_tensor(value).to(getattr(torch, dtypes[name]))
        for name, value in arguments_of(spec, pair).items()
    }
    assert {name for name, tensor in with_booleans(given).items() if tensor.dtype == torch.bool} == logical
