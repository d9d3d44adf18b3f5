"""Where jobs run: `base.py` is the contract, `local.py` is worker processes of this machine, `ray.py` a cluster.

Independent of what a job does.
Entered by stages.
"""
