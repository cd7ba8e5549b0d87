"""What an image file says of itself, read in linear time before a decoder sees the file."""
