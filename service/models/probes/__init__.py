"""What is measured of a model when it is loaded."""
