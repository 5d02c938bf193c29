"""The ranks of one job: the process group, what they add up and agree on, and what each tells its
supervisor.
"""
