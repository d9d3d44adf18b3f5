"""All that a build will do, decided before it starts: graphs, memory, sizes, times, conflicts, and the lock.

Pure: reads no weights and no device. Imports no torch. Entered by stages and the rooms above.
"""
