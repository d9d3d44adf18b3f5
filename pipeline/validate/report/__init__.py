"""The results of the gates as data (`schema.py`), HTML page, Markdown and JUnit.

Contains no limits. Imports no torch.
Entered by `validate.gates`, `validate.run`, measure and cli.
"""
