"""The small text-to-image model shipped with Weft, its data set and its training."""

from pathlib import Path
from typing import Final

MODEL_FOLDER: Final = Path(__file__).parent / "model"
"""The diffusers folder of the embedded model."""

STUDENT_FOLDER: Final = Path(__file__).parent / "lcm"
"""The diffusers folder of the latent consistency model distilled from it."""

ADAPTER_FILE: Final = MODEL_FOLDER / "weft" / "adapters" / "embedded-lcm-lora.safetensors"
"""The LCM-LoRA of the embedded model."""

__all__ = ["ADAPTER_FILE", "MODEL_FOLDER", "STUDENT_FOLDER"]
