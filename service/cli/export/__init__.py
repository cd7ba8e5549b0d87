"""`camserve export`: explains images into a file that a labeling tool imports."""
