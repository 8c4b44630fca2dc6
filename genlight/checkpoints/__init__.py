"""Checkpoints of one training on disk, and the algebra of their combinations. Nothing here knows a trainer."""
