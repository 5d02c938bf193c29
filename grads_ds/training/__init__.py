"""Stage 4 (sft.py), and what it shares with the probe's preliminary training: train.py, its
checkpoints and its trainer.
"""
