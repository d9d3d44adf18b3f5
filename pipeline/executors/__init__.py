"""Where jobs run: `base.py` the contract, `local.py` worker processes on this machine.

Does not know what a job does. Entered by stages.
"""
