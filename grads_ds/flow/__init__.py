"""Which stages and units are due, and their start: in this process (prepare, select, report), or on
every rank through the launcher (probe, sft, evaluate).
"""
