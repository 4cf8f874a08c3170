"""What kernels take of a device's memory beside the cache: told before it is allocated, so that sizing leaves room for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelMemory:
    """One use of memory. name: for logs and reports. fixed: bytes in any case. per_slot: bytes more for every request slot."""

    name: str
    fixed: int = 0
    per_slot: int = 0

    def bytes(self, slots: int) -> int:
        """With ``slots`` request slots, the padding slot among them."""
        return self.fixed + slots * self.per_slot
