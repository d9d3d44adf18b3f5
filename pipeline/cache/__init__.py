"""The local and the shared cache: compiled graphs, memos and goldens by content, and their collection.

Knows keys and bytes, not what they mean. Imports no torch.
Entered by every room above.
"""
