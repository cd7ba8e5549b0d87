"""Headers of image files, read in linear time before a decoder runs."""
