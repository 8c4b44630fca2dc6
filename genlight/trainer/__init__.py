"""Plugins for Lightning's trainer: how checkpoints are stored, how devices work together, where numbers are logged."""
