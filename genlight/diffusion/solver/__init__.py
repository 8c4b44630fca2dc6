"""One solver for diffusion ODEs: decisions step by step, compiled to a table of weights that sampling adds up."""
