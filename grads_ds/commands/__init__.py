"""One file per sub-command. Each has `add(commands)`, which declares its arguments and sets
`handler(args) -> exit status`.

Imports that take time stand inside the handlers, so that `grads-ds --help` answers at once.
"""
