"""Kernels of several ranks: one whose kernels are other ones, or cannot be made, stops all before they wait for each other."""

import logging

import pytest

from harness.server_args import server_args, write_model
from sglang.srt.kvtuner import hooks
from sglang.srt.kvtuner.attention import dispatch
from sglang.srt.kvtuner.attention.base import KernelsUnavailable
from sglang.srt.kvtuner.attention.cpu import CpuKernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.triton import TritonKernels
