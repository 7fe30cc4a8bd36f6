"""The precision that networks are trained in."""

import torch


def autocast(device: str) -> torch.autocast:
    """Autocast to bfloat16 where the device supports it; a CPU without AVX-512 only emulates it.

    An emulated convolution takes sixty times as long as one in float32.
    """
    kind = torch.device(device).type
    fast = kind != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    # A cache of cast weights would outlive the capture of a CUDA graph.
    return torch.autocast(kind, torch.bfloat16, enabled=fast, cache_enabled=False)
