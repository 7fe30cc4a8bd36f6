"""The precision that networks are trained in."""

import torch


def autocast(device: str) -> torch.autocast:
    """bfloat16 where the device computes in it, which a CPU without AVX-512 only imitates.

    An imitated convolution takes sixty times as long as one in float32.
    """
    kind = torch.device(device).type
    fast = kind != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    # A cache of cast weights would outlive the capture of a graph.
    return torch.autocast(kind, torch.bfloat16, enabled=fast, cache_enabled=False)
