"""The local and the shared cache: compiled graphs, memos, goldens and sent files, and their collection.

Independent of the meaning of keys and bytes. Imports no torch.
Entered by every room above.
"""
