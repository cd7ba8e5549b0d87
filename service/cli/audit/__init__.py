"""`camserve audit`: what a model depends on over a folder of images."""
