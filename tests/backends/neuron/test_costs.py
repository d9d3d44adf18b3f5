"""Costs counted on a small HLO module, made by hand."""

import pytest
from click.testing import CliRunner

from pipeline.backends.neuron.costs import costs, floor_s
from pipeline.backends.neuron.hlo_messages import module_class
from pipeline.cli.main import main
from pipeline.recipe.chips import CHIPS

BF16, F32 = 16, 11


@pytest.fixture
def module():
    """Two reads of a weight and one of a cache's slice, whose first result is kept until the end."""
    made = module_class()(entry_computation_id=1)
    entry = made.computations.add(id=1)

    def add(opcode, shape, kind, *operands):
        one = entry.instructions.add(opcode=opcode, id=len(entry.instructions) + 1, operand_ids=operands)
        one.shape.element_type = kind
        one.shape.dimensions.extend(shape)
        if opcode == "dot":
            one.dot_dimension_numbers.lhs_contracting_dimensions.append(1)
            one.dot_dimension_numbers.rhs_contracting_dimensions.append(1)
        return one.id

    x, weight = add("parameter", [4, 8], BF16), add("parameter", [16, 8], BF16)
    cache = add("parameter", [64, 16], BF16)
    first = add("dot", [4, 16], F32, x, weight)
    view = add("reshape", [4, 16], F32, first)
    written = add("scatter", [64, 16], BF16, cache, view)
    part = add("slice", [32, 16], BF16, written)
    scores = add("dot", [4, 32], F32, view, part)
    add("transpose", [8, 16], BF16, weight)
    gathered = add("all-gather", [4, 64], F32, scores)
    add("dot", [4, 16], F32, x, weight)
    add("tuple", [], 0, first, gathered, written)
    entry.root_id = len(entry.instructions)
    return made


def test_costs_of_a_module(module):
    found = costs(module)
    assert found.dot_flops == {"bf16": 2 * (2 * 4 * 16 * 8), "f32": 2 * 4 * 32 * 16}
    weight, part = 16 * 8 * 2, 32 * 16 * 2
    assert found.read_bytes == 2 * (weight + 4 * 8 * 2) + part  # x is a parameter as well
    assert found.collective_bytes == {"all-gather": 4 * 64 * 4}
    assert (found.largest.opcode, found.largest.bytes) == ("slice", part)
    # The first product lives to the end; a scatter has the memory of its cache.
    assert found.peak_bytes == 4 * 16 * 4 + 4 * 64 * 4 + max(4 * 32 * 4, 4 * 16 * 4) + weight
    assert found.operators["dot"] == 3
    assert (found.transposes, found.transposed_bytes) == (1, weight)
    assert found.contracted == {1: 3}  # the cache here is a matrix, too


def test_floor_is_the_larger_of_products_and_reads(module):
    found, core = costs(module), CHIPS["trn2"].cores[2]
    assert floor_s(found, core) == found.read_bytes / core.bytes_per_s
    assert floor_s(found, CHIPS["trn1"].cores[1]) > floor_s(found, core)


def test_costs_of_a_recipe_for_a_cpu_are_refused():
    done = CliRunner().invoke(main, ["plan", "pico-spec", "--costs"])
    assert done.exit_code == 2
    assert "costs are counted on the HLO of Neuron graphs" in done.output + str(done.exception)
