"""Starts the ranks of a distributed stage on every host, watches them, and says how they ended."""
