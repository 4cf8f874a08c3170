"""What kind of machine this is. Needs only the standard library."""

import functools
import shutil
import subprocess


@functools.cache
def has_cuda():
    """Whether this machine has an NVIDIA GPU that its driver lists."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def device_flags():
    """A server's flags that choose the device: the CPU where there is no GPU."""
    return [] if has_cuda() else ["--device", "cpu"]
