"""Search without gradients: spaces, strategies, the archive that is the state, and the driver that joins them.

Nothing here knows a trainer: the objective is any callable that turns a candidate into a score, lower being better.
"""
