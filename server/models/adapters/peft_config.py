"""Reads configs of peft, which say how the weights of an adapter are used.

diffusers stores them in a file's metadata. peft's own ``save_pretrained`` writes one beside the
weights; there, entries are refused unless they are known to have no effect on the weights' use.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from server.errors import AdapterMismatch
from server.models.folder import joint_stamp, stamp_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

__all__ = ["MAX_ALPHA", "WEIGHTS", "PeftConfig", "adapter_stamp", "files_of"]

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"

METADATA: Final = "lora_adapter_metadata"
"""Entry of a file's metadata in which diffusers stores the configs of networks, as JSON."""

MAX_ALPHA: Final = 1e6

DEFAULT_ALPHA: Final = 8
"""Alpha of a config of peft without ``lora_alpha``, as in its ``LoraConfig``."""

KIND: Final = "LORA"

USED: Final = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
"""Entries that say how the weights are used."""

HARMLESS: Final = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
        *("revision", "runtime_config", "task_type"),
        # The names and shapes of the tensors show these.
        *("bias", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_bias"),
        *("modules_to_save", "r", "rank_pattern", "target_modules"),
        # These are of training only, or are read only beside an entry that is refused.
        *("ensure_weight_tying", "eva_config", "lora_dropout", "megatron_core"),
        *("qalora_group_size", "velora_config"),
    }
)

INITIALIZATIONS: Final = (True, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the model's own weights as they are. With others, such
as ``pissa``, an adapter is trained beside changed weights."""

LITERAL_NAME: Final = re.compile(r"[\w.-]+")
"""Patterns of layers' names that match themselves only."""


@dataclass(frozen=True, slots=True, eq=False)
class PeftConfig:
    """The config of a network's adapter.

    Attributes:
        source: where it was found, for error messages.
        entries: values by peft's names; empty where there is no config.
    """

    source: str
    entries: Mapping[str, Any]

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], part: str) -> PeftConfig:
        """Read the config of a network from a file's metadata.

        Args:
            metadata: metadata of the file.
            part: name of the network in a model folder.

        Raises:
            AdapterMismatch: the config cannot be read; the message continues a sentence that begins
                with the adapter's name.
        """
        config = _object(metadata.get(METADATA) or "{}")
        if config is None:
            raise AdapterMismatch(f"has metadata {METADATA} that is not a JSON object")
        prefix = f"{part}."
        own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        return cls(METADATA, {"lora_alpha": DEFAULT_ALPHA, **own} if own else {})

    @classmethod
    def of_file(cls, path: Path) -> PeftConfig:
        """Read the config that ``save_pretrained`` wrote.

        Args:
            path: path of the config.

        Raises:
            AdapterMismatch: the config has an entry that is not supported; the message continues a
                sentence that begins with the adapter's name.
            OSError: the config cannot be read.
        """
        config = _object(path.read_bytes())
        if config is None:
            raise AdapterMismatch(f"has an {CONFIG} that is not a JSON object")
        if (kind := config.get("peft_type")) != KIND:
            raise AdapterMismatch(
                f"has the peft_type {str(kind)[:40]!r} in {CONFIG}; allowed is {KIND!r}"
            )
        begun = config.pop("init_lora_weights", None)
        if begun and begun not in INITIALIZATIONS:
            raise AdapterMismatch(
                f"has the init_lora_weights {str(begun)[:40]!r} in {CONFIG}, which is not supported"
            )
        for name, value in sorted(config.items()):
            if value and name not in USED and name not in HARMLESS:
                raise AdapterMismatch(f"has {name[:40]!r} in {CONFIG}, which is not supported")
        given = {name: config[name] for name in USED if name in config}
        return cls(CONFIG, {"lora_alpha": DEFAULT_ALPHA, **given})

    @property
    def is_dora(self) -> bool:
        """Whether all layers have magnitudes."""
        return bool(self.entries.get("use_dora"))

    def scale(self, names: Collection[str], rank: int) -> float:
        """Alpha / rank of a layer, 1 where there is no config.

        Args:
            names: names that the layer has in patterns.
            rank: rank of the layer.

        Raises:
            AdapterMismatch: alpha is no number, or is of layers that a regular expression selects;
                the message continues a sentence that begins with the adapter's name.
        """
        patterns = self.entries.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterMismatch(
                f"has an alpha_pattern in {self.source} that is not a JSON object"
            )
        alpha = self.entries.get("lora_alpha", rank)
        # As in peft, the first pattern that matches a name, or the end of a name, counts.
        matching = (own for pattern, own in patterns.items() if self._matches(pattern, names))
        alpha = next(matching, alpha)
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not abs(alpha) <= MAX_ALPHA
        ):
            raise AdapterMismatch(
                f"has the alpha {str(alpha)[:40]!r}; a number of at most {MAX_ALPHA:g} is needed"
            )
        return alpha / (rank**0.5 if self.entries.get("use_rslora") else rank)

    def _matches(self, pattern: str, names: Iterable[str]) -> bool:
        whole = pattern.removeprefix("^")
        plain = whole.replace("\\.", ".")
        if not LITERAL_NAME.fullmatch(plain):
            raise AdapterMismatch(
                f"has the regular expression {pattern[:80]!r} in the alpha_pattern of "
                f"{self.source}, which is not supported"
            )
        starts = whole != pattern
        return any(name == plain or (not starts and name.endswith(f".{plain}")) for name in names)


def files_of(path: Path) -> tuple[Path, Path | None]:
    """The file with an adapter's weights, and the config that peft saved beside it, if any.

    Args:
        path: path of the weights, or of the folder that peft saved.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    config = weights.with_name(CONFIG)
    return weights, config if weights.name == WEIGHTS and config.is_file() else None


def adapter_stamp(path: Path) -> tuple[int, int]:
    """When an adapter's weights or config were last changed, and the bytes of both.

    Args:
        path: path of the weights, or of the folder that peft saved.
    """
    return joint_stamp(stamp_of(file) for file in files_of(path) if file is not None)


def _object(text: str | bytes) -> dict[str, Any] | None:
    """A JSON object; None if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
