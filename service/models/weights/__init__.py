"""Files of weights: opened without running code, and matched to the model."""
