"""The longest prompt that runs whole, and the warning about longer ones."""

from pipeline.recipe.schema import Shapes
from pipeline.validate.lengths import cut_warning, longest_prompt

SHAPES = Shapes(batch=(1,), prefill=(64, 128), kv=(256, 512))


def test_a_prompt_runs_whole_if_the_caches_hold_it_and_its_answer():
    """It had to fit the largest prefill bucket: the gates cut 34 of 65 prompts that the engine reads in parts."""
    assert longest_prompt(SHAPES, 32) == 480
    assert longest_prompt(SHAPES, 500) == 128  # with a shorter answer


def test_cut_warning_counts_the_prompts_and_names_the_remedy():
    assert cut_warning([10, 480], SHAPES, 32) is None
    assert cut_warning([10, 481, 500], SHAPES, 32) == (
        "warning: 2 of 3 prompts do not fit a cache of 512 positions with 32 new tokens; "
        "only their last 480 tokens run; add a kv bucket of 532 to the recipe, or shorten the prompts"
    )
