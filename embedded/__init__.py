"""The small text-to-image model that ships with Weft, its data set and its training."""

from pathlib import Path
from typing import Final

MODEL_FOLDER: Final = Path(__file__).parent / "model"
"""The diffusers folder of the embedded model."""

__all__ = ["MODEL_FOLDER"]
