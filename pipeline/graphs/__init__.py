"""What a graph is: its bucket, its inputs and outputs, the layouts of weights, and the module that is traced.

Independent of backends; compiles nothing. Only `module` and `arguments` need torch.
Entered by every room above.
"""
