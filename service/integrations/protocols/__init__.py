"""KServe V1, Open Inference V2 and TorchServe."""
