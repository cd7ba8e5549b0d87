"""Measurements of a model on many images: layers compared, int8 calibrated."""
