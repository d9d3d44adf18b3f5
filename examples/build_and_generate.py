"""Build an artifact and generate text with it: `python examples/build_and_generate.py [RECIPE] [FOLDER]`.

The default recipe has a tiny random pair, so the text is noise. It needs the install profile `build`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tandem_spec import build, load

RECIPE = Path(__file__).parents[1] / "recipes/pico-spec.yaml"


def main(recipe: Path, folder: Path) -> None:
    """Build a recipe into a folder, then answer a text and a chat, and stream a third answer."""
    artifact = build(recipe, folder)  # compiles the graphs that no cache has, then runs the gates
    print(f"built {artifact.manifest.name}@{artifact.manifest.version} in {artifact.root}")
    with load(folder) as engine:
        prompts = ["The quick brown fox", [{"role": "user", "content": "Hi"}]]
        for answer in engine.generate(prompts, max_new_tokens=12):
            print(f"{answer.text!r}: {len(answer.tokens)} tokens, {answer.steps} speculative steps")
        for piece in engine.stream("Once upon a time", max_new_tokens=12):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(*arguments, *(RECIPE, Path("artifacts/example"))[len(arguments) :])
