"""The table of dtypes against torch and safetensors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from pipeline.graphs.dtypes import DTYPES, SAFETENSORS, TensorDtype, torch_dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_dtype_is_what_torch_and_safetensors_say(dtype: TensorDtype) -> None:
    tensor = torch.zeros(3, dtype=torch_dtype(dtype.name))
    data = save({"x": tensor})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert str(tensor.dtype) == f"torch.{dtype.name}"
    assert tensor.element_size() == dtype.size_bytes
    assert header["x"]["dtype"] == dtype.short
    assert SAFETENSORS[dtype.short] is dtype


def test_the_table_needs_no_torch() -> None:
    modules = "pipeline.graphs.dtypes, pipeline.sources.kinds, pipeline.plan.lock"
    script = f"import sys; import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
