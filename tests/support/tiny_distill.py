"""A tiny target that tests train drafts for, and runs of `tandem distill` for it."""

import json

from pipeline.distill.settings import DistillSettings
from pipeline.recipe.schema import Recipe

CONTENT = {
    "name": "tiny",
    "target": {"source": "pico://llama", "dtype": "float32"},
    "draft": {"derive": {"from": "target", "layers": (0,)}},
    "speculation": {"draft_tokens": (2,)},
    "shapes": {"batch": (1,), "prefill": (64,), "kv": (128,)},
    "validate": {"prompts": "held-out.jsonl", "max_new_tokens": 10},
}
HELD_OUT = ["The quick brown fox jumps", "def add(first, second):"]
ASKED = ["Say hi", "Tell me about the river that flows through the old town", "Name three birds", "Count to ten"]


def request_of(work, out: str = "head", **more) -> DistillSettings:
    settings = {"tokens": 2_500, "steps": 50, "draft_vocab": 256, "cache": work / "cache", **more}
    return DistillSettings(recipe=Recipe.model_validate(CONTENT), base=work, out=work / out, **settings)


def asking(work, name: str, prompts: list[str], **more) -> DistillSettings:
    """Answers to given prompts: seconds of writing."""
    path = work / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    return request_of(work, name, prompts=path, **more)
