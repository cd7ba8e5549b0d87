"""Audit of a model over many images: what turns images of other classes into a class."""
