"""The built-in model: a small network that names five flowers, and its weights."""
