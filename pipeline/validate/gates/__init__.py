"""The gates: parity, losslessness, distribution, acceptance, speed. Each returns a section of the report.

Computes no reference and formats no report.
Entered by `validate.run` and measure.
"""
