"""Stage 5: losses, tasks and forgetting of every model; and the models made from trained ones:
interpolations, and the best within a limit (best.py).
"""
