"""The YAML file as frozen, checked records: one file per section (training.py has `sft` and what
the trainings share), and the names that sections are checked against.
"""
