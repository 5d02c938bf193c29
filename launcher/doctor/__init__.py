"""Whether the hosts are fit for a run: facts of each, held against what a run needs and what the
other hosts have.
"""
