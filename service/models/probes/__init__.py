"""Measurements of a model when it is loaded."""
