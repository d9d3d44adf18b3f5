"""What tests of the StableHLO frontend share: its backend, and its graphs on XLA's CPU client."""

from importlib.util import find_spec

import pytest

from pipeline.backends.neuron.backend import NeuronBackend
from pipeline.recipe.backend_settings import NeuronSettings


@pytest.fixture(scope="module")
def backend():
    missing = [name for name in ("torch_mlir", "jaxlib", "jax") if find_spec(name) is None]
    if missing:
        pytest.fail(f"not installed: {', '.join(missing)}: run `make test-hlo`")
    return NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2, frontend="stablehlo"))


@pytest.fixture(scope="module")
def graphs_of():
    from support.hlo_graphs import HloGraphs

    return HloGraphs
