"""LightningDataModules: real images to train on, common random numbers to evaluate with."""
