"""KVTuner's quantized KV cache: formats, packing, page pool, residual window and attention.

Everything here is reached only with ``--enable-kvtuner-quant``; see docs/kvtuner.md of the repository.
"""
