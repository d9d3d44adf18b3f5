"""Where jobs run: `base.py` is the contract, `local.py` runs worker processes on this machine.

Does not know what a job does.
Entered by stages.
"""
