"""What tests share: real servers, checkpoints, and golden data that live outside the repository."""

from harness.data import find_shared_data
from harness.models import random_llama, smollm2
from harness.server import RunningServer, launch_server

__all__ = ["RunningServer", "find_shared_data", "launch_server", "random_llama", "smollm2"]
