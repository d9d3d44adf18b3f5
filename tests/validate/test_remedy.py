"""What to do about gates that failed: a cure where there is one, and the report."""

from __future__ import annotations

from pathlib import Path

from pipeline.validate.report.schema import Gate
from pipeline.validate.run import remedy
from support.reports import recipe_of, report_of


def test_remedy_of_too_low_an_acceptance_names_distill_and_the_limit(tmp_path: Path):
    """It said `open parity.html` alone."""
    recipe = recipe_of("llama", 0, "float32")
    whole = report_of(tmp_path, recipe)
    root = Path("artifacts/planted")
    assert remedy(whole, recipe, root, tmp_path) == "open artifacts/planted/reports/parity.html"
    low = Gate(name="acceptance", passed=False, findings=("K=2: 1.10 tokens per step is below the floor 1.3",))
    failed = whole.model_copy(update={"passed": False, "gates": (*whole.gates[:-1], low)})
    said = remedy(failed, recipe, root, Path("recipes"))
    assert "`tandem distill planted`, and name its folder in `draft.source`" in said
    assert "lower `validate.gates.tokens_per_step` (now 1.0) in the recipe" in said
    assert "open artifacts/planted/reports/parity.html" in said
    (tmp_path / "planted.yaml").touch()
    assert f"`tandem distill {tmp_path}/planted.yaml`" in remedy(failed, recipe, root, tmp_path)
