"""Lightning modules: one per kind of generator, and the classifier whose features the metrics use."""
