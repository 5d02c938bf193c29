"""Stage 2: a preliminary training, then every pool sample's own gradient norms; callback.py offers
the norms to any transformers Trainer.
"""
