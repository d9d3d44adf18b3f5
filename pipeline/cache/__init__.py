"""The local and the shared cache: compiled graphs, memos and goldens by content, and their collection.

Independent of the meaning of keys and bytes. Imports no torch.
Entered by every room above.
"""
