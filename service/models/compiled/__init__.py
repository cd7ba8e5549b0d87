"""The compiled lane: a model cut at its default layer into a compiled front and a tail."""
