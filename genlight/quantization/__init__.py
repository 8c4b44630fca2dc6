"""Post-training quantization: uniform quantizers, balance of activations and weights, observers, quantized layers."""
