"""The models that are served: what they are, how they are loaded, and who may use them."""
