"""`camserve explain --report`: one HTML file on all images of a run."""
