"""Models on DeepSpeed engines: loaded as their folder has them, shared out over ranks, passed over
frozen, written as folders.
"""
