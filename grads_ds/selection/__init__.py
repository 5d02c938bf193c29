"""Choosing a subset of the pool from the score table: which samples, why, and how they compare with
others' choices.

table -> signal -> density -> region (GrADS) or another criterion -> order -> budget -> choice.
`stage` reads and writes the files; everything else is pure functions on numpy arrays. No torch
import.
"""
