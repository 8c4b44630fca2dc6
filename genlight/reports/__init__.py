"""Reports, figures, cost estimates and proofs: what a run leaves for people. Nothing here knows Lightning."""
