"""Predictors that rank candidates before they are measured."""
