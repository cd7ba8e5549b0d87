"""The built-in model: a small network that names five flowers, its weights and its training."""
