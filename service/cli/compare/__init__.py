"""`camserve compare`: two versions of a model on a folder of images, as a gate for releases."""
