"""Weights files: read without running code, and matched to the model."""
