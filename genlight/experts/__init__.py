"""The experts of mixture-of-experts models of transformers: read, prune, merge, score and save. Knows no trainer."""
