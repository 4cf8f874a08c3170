"""What gpu_check.py and gpu_bench.py run: the checks, one module each, and what they share.

Modules import torch, triton and the checkout's own sources; sources.py must have been installed before.
"""
