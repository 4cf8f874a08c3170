"""Compiled kernels over the quantized KV cache (srt/kvtuner); sources: sgl-kernel of the repository."""
