"""Measurements of models on many images: layers, int8, two versions compared, drift."""
