"""From data files and a model to a configuration that runs, with a reason at every value.

look_at_rows -> hold_out -> choose_values -> write_config; `other_tools` reads what another tool's
own configuration says. Serves `grads-ds init`.
"""
