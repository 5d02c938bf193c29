"""A frozen model's micro-batch: forward, head, backward, and one sample at a time what is left."""
