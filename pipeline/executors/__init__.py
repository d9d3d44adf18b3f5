"""Where jobs run: `base.py` is the contract, `local.py` runs worker processes on this machine.

Independent of what a job does.
Entered by stages.
"""
