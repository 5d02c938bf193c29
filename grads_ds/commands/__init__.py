"""The sub-commands: a file for each, but that run.py serves `run` and the six stages.

cli.py lists them, each with the function here that declares its arguments and sets its handler,
(args) -> exit status. No sub-command of their own: options.py and detach.py (where and how jobs
run), watching.py, score_tables.py, guidance.py and next_step.py (what help and last lines say).

Imports that take time stand inside the handlers, so that `grads-ds --help` answers at once.
"""
