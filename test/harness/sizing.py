"""A model runner and kernels as sizing sees them, without a model."""

from types import SimpleNamespace
from typing import ClassVar

import torch

from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.attention.steps import StepPlanner
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.hooks import build_pool
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

MB = 1 << 20


class FakeRunner:
    """The parts of upstream's KVCacheConfigurator that sizing goes through: its own methods, and a given budget."""

    config_from_budget = KVCacheConfigurator.config_from_budget
    resolve_max_num_reqs = KVCacheConfigurator.resolve_max_num_reqs
    _apply_token_constraints = KVCacheConfigurator._apply_token_constraints
    _resolve_memory_pool_config = KVCacheConfigurator._resolve_memory_pool_config

    kv_cache_dtype, device, attn_dp_size, mambaish_config = torch.bfloat16, "cpu", 1, None
    pool_page_size = 64

    def __init__(self, budget, layers=2, kv_heads=2):
        self.budget = budget
        self.layer_info = SimpleNamespace(start_layer=0, end_layer=layers)
        self.model_config = SimpleNamespace(
            num_hidden_layers=layers,
            num_attention_heads=4,
            head_dim=64,
            context_len=4096,
            get_num_kv_heads=lambda tp, dcp: kv_heads // tp,
            get_total_num_kv_heads=lambda: kv_heads,
        )

    def _profile_available_bytes(self, pre_model_load_memory):
        return self.budget

    def settle(self):
        """Sizes as a model runner gets them, and the pool that is then built; returns both."""
        config = self._resolve_memory_pool_config(pre_model_load_memory=0)
        table = ReqToTokenPool(config.max_running_requests, 64, "cpu", enable_memory_saver=False)
        return config, build_pool(self, config, table)


class FakeKernels:
    """Kernels of which sizing sees their need of memory."""

    name, planner_class, graph_safe = "fake", StepPlanner, False
    needed: tuple[KernelMemory, ...] = ()
    workloads: ClassVar[list[Workload]] = []

    def __init__(self, storage, workload):
        self.workloads.append(workload)

    @classmethod
    def memory(cls, workload):
        cls.workloads.append(workload)
        return cls.needed

    def compile(self, planner, workload):
        self.workloads.append(workload)


def allocated(pool):
    """Bytes of a pool's buffers."""
    return pool.storage.page_bytes() + pool.storage.sink_bytes() + pool.storage.ring_bytes()
