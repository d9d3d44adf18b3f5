"""How well a draft agrees with its target before a build compiles, and whether another reading of its file is better.

`examine` is the entry. Runs both models eagerly on prompts of the recipe; has no limits of gates and compiles nothing.
Entered by stages and cli.
"""
