"""The same inside a user's own training step."""
