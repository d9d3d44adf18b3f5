"""Where releases live: one contract (`base`), one file for each kind of registry."""
