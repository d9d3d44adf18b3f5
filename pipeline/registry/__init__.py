"""Where releases live: publish, pull, list, aliases, collection. One layout over every kind of store.

Loads and runs nothing. Imports no torch. Entered by cli and serve.
"""
