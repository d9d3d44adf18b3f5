"""What a graph is: its bucket, the tensors that cross its border, how weights are laid out, and the traced module.

Knows no backend and compiles nothing; only `module` and `arguments` import torch. Entered by plan and all rooms above.
"""
