"""The warning about prompts that are longer than every prefill graph."""

from pipeline.validate.lengths import cut_warning


def test_cut_warning_counts_the_prompts_and_names_the_remedy():
    """34 of 65 prompts were cut, and only the page said so."""
    assert cut_warning([10, 128], 128) is None
    assert cut_warning([10, 129, 200], 128) == (
        "warning: 2 of 3 prompts are longer than the largest prefill bucket; only their last 128 tokens run; "
        "add a prefill bucket of 200 to the recipe, or shorten the prompts"
    )
