"""transformers' config of a checkpoint, for the reference."""

from __future__ import annotations

import math

from pipeline.validate.reference.skeleton import with_floats


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them():
    """`time_step_limit` of Granite 4 is such a list; the reference of a built pair ended in a traceback."""
    written = {"time_step_limit": [0.0, {"__float__": "Infinity"}], "rope": {"low": {"__float__": "-Infinity"}, "n": 2}}
    assert with_floats(written) == {"time_step_limit": [0.0, math.inf], "rope": {"low": -math.inf, "n": 2}}
    assert math.isnan(with_floats({"__float__": "NaN"}))
