"""camserve: PyTorch image classifiers over HTTP, every prediction with the evidence for it."""

__version__ = "0.1.0"
