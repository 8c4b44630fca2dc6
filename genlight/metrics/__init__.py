"""Metrics of generated images: torchmetrics with a feature extractor of choice. Nothing here knows Lightning."""
