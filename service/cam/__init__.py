"""Class activation maps: record, compute, draw, outline."""
