"""What `validate` can run: a plain measurement, and later searches and calibrations."""
