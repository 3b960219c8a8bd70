"""Experiments: comparisons of models and measurements of influence."""
