"""tune: the best K to draft with, and whether it pays."""

from __future__ import annotations

from pipeline.cli.tune import _best, _show
from pipeline.measure.tune import choose


def test_best_names_a_k_that_can_be_built():
    """It said `best K=0` in every class, then recommended K=1."""
    assert _best({0: 1.0, 1: 0.9, 2: 0.8}, built=[1, 2]) == ("1", "0.90x", "slower than plain decode")


def test_best_says_that_a_k_was_not_built():
    assert _best({0: 1.0, 1: 1.1, 2: 1.4}, built=[1]) == ("2", "1.40x", "K=2 was not built: estimated")


def test_show_says_if_no_k_pays(capsys):
    _show(choose({1: {64: {2: 3.0}}}, {"all": [0.1, 0.1]}), built=[2])
    assert "no K is faster than plain decode on this machine with this draft" in capsys.readouterr().out


def test_show_of_a_k_that_pays_is_a_table(capsys):
    _show(choose({1: {64: {2: 1.2}}}, {"all": [0.9, 0.9]}), built=[2])
    shown = capsys.readouterr().out
    assert "no K is faster" not in shown
    assert "schedule of K for vLLM's own drafts: [[1, 1, 8]]" in shown
    assert shown.splitlines()[1].split() == ["1", "64", "K=2", "1.20x", "a", "decode", "step"]
