"""`camserve export`: pictures explained, in the form that a labeling tool imports."""
