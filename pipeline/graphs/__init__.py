"""What a graph is: its bucket, its inputs and outputs, the layouts of weights, and the module that is traced.

Independent of backends; compiles nothing. Only `module`, `arguments`, `verify_arguments` and `shards` need torch.
Entered by every room above.
"""
