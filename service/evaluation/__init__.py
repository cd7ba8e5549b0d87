"""Measurements of models on many images: layers, int8, and two versions compared."""
