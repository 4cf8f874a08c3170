"""Attention over the packed cache: the kernels' interface, its implementations, and the backend that upstream calls."""
