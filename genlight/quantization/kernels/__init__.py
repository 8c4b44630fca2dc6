"""Triton kernels of quantized layers, each behind an operator of torch that `torch.compile` can see through."""
