"""API keys: read from the settings, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from server.engine.client import Client
from server.json_list import json_list
from server.wording import demand_of, shown

__all__ = ["ApiKey", "keys_of"]

MIN_CHARACTERS: Final = 16
MAX_CHARACTERS: Final = 256

NAMES: Final = "must be 1 to 64 letters, digits, dots, underscores or hyphens"

_HASHED = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SENDABLE = re.compile(r"[!-~]([ -~]*[!-~])?")
"""Texts that arrive through an HTTP header exactly as they were sent."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that grants access to the server; only its hash is kept.

    Attributes:
        digest: SHA-256 of the key.
        client: client whose share of the device its requests use.
        unloads: whether it may unload models, which others may be about to use.
    """

    digest: bytes
    client: Client
    unloads: bool = True

    def opens_for(self, offered: str) -> bool:
        """Whether this is the key, in a time that does not depend on how much of it is correct."""
        return hmac.compare_digest(self.digest, _digest(offered))


class KeyEntry(BaseModel):
    """A key and the limits and rights of its holder."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    key: str = Field(description="The key, or `sha256:` and the digits of its SHA-256.")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name under which metrics count it; by default `key-1`, `key-2` and so on.",
    )
    weight: float = Field(
        default=1,
        ge=0.01,
        le=100,
        description="Weight of its share of the device among keys with work.",
    )
    images: int | None = Field(
        default=None, ge=1, description="Maximum images that it may have waiting or running."
    )
    device_s: float | None = Field(
        default=None,
        gt=0,
        description="Maximum device seconds that these may need, as estimated.",
    )
    priority: Literal["interactive", "batch"] = Field(
        default="interactive",
        description="`batch` gives all its requests batch priority, behind all interactive ones.",
    )
    unload: bool | None = Field(
        default=None,
        description="Whether it may unload models that are not in use; by default only if it is "
        "the only key.",
    )


def keys_of(value: Any) -> Any:
    """Read the keys of a setting: a list, or one text with a JSON list or comma-separated keys.

    A key is a text, or an object with the fields of :class:`KeyEntry`.

    Raises:
        ValueError: a key is empty, too short or too long, or could not be sent in a header; a
            field of an object has an invalid value; two keys have one name.
    """
    if isinstance(value, str):
        value = _split(value.strip())
    if not isinstance(value, Iterable):
        return value
    given = list(value)
    alone = len(given) == 1
    keys = tuple(_read(number, key, alone=alone) for number, key in enumerate(given, start=1))
    names = Counter(key.client.name for key in keys if isinstance(key, ApiKey))
    for name, count in names.items():
        if count > 1:
            raise ValueError(
                f"{count} keys have the name {name!r}; each key needs a name of its own."
            )
    return keys


def _split(text: str) -> Any:
    if text.startswith("["):
        return json_list(text)
    return [part.strip() for part in text.split(",")] if text else []


def _read(number: int, key: Any, *, alone: bool) -> Any:
    if isinstance(key, SecretStr):
        key = key.get_secret_value()
    entry = {"key": key} if isinstance(key, str) else key
    if isinstance(entry, ApiKey):
        return entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"key {number} is {shown(entry)}; it must be a string or an object.")
    try:
        about = KeyEntry.model_validate(entry)
    except ValidationError as refusal:
        raise ValueError(_explained(number, refusal)) from None
    client = Client(
        about.name or f"key-{number}",
        weight=about.weight,
        max_images=about.images,
        max_device_s=about.device_s,
        batch=about.priority == "batch",
    )
    unloads = alone if about.unload is None else about.unload
    return ApiKey(_digest_of(number, about.key), client, unloads)


def _explained(number: int, refusal: ValidationError) -> str:
    """Describe the first error of an entry, without repeating what it has as its key."""
    error = refusal.errors(include_url=False)[0]
    field = str(error["loc"][0])
    if error["type"] == "missing":
        return f"key {number} has no `{field}`, which is required."
    if error["type"] == "extra_forbidden":
        # A field name as long as a key may be one by mistake.
        name = f"the field `{field}`" if len(field) < MIN_CHARACTERS else "a field"
        allowed = ", ".join(KeyEntry.model_fields)
        return f"key {number} has {name}, which is unknown; allowed are {allowed}."
    value = (
        "a `key` that is not allowed" if field == "key" else f"the {field} {shown(error['input'])}"
    )
    demand = NAMES if error["type"] == "string_pattern_mismatch" else demand_of(error)
    return f"key {number} has {value}; it {demand}."


def _digest_of(number: int, key: str) -> bytes:
    if key.startswith(_HASHED):
        return _given_digest(number, key.removeprefix(_HASHED))
    if not MIN_CHARACTERS <= len(key) <= MAX_CHARACTERS:
        length = f"has {len(key)} characters" if key else "is empty"
        raise ValueError(
            f"key {number} {length}; a key has {MIN_CHARACTERS} to {MAX_CHARACTERS}, for "
            "example those that `openssl rand -hex 32` prints."
        )
    if not _SENDABLE.fullmatch(key):
        raise ValueError(
            f"key {number} has characters that an HTTP header cannot carry; allowed are printable "
            "ASCII characters, with spaces only inside."
        )
    return _digest(key)


def _given_digest(number: int, digits: str) -> bytes:
    if not _DIGEST.fullmatch(digits.lower()):
        raise ValueError(
            f"key {number} begins with 'sha256:'; 64 hexadecimal digits must follow, those of the "
            "key's SHA-256."
        )
    return bytes.fromhex(digits)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
