"""The heart: the graphs of a pair, how drafts are accepted, how tokens are chosen."""
