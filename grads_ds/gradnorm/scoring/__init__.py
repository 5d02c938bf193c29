"""A frozen model's micro-batch: forward, head, backward, and one sample at a time what is left.

The table that the results are kept in is another room's: grads_ds/scores.
"""
