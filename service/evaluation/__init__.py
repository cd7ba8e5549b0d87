"""What many images say of a model."""
