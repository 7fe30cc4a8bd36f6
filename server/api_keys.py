"""API keys: read from the settings, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import SecretStr

__all__ = ["ApiKey", "keys_of"]

FEWEST_CHARACTERS: Final = 16
MOST_CHARACTERS: Final = 256

_HASHED = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SENDABLE = re.compile(r"[!-~]([ -~]*[!-~])?")
"""What arrives through an HTTP header as it was sent."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that opens the server; the key itself is not kept.

    Attributes:
        digest: the key's SHA-256.
    """

    digest: bytes

    def opens_for(self, offered: str) -> bool:
        """Whether this is the key, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(self.digest, _digest(offered))


def keys_of(value: Any) -> Any:
    """The keys of a setting: a list of keys, or one text with a JSON list or commas between them.

    Raises:
        ValueError: a key is empty, too short or too long, or could not be sent in a header.
    """
    if isinstance(value, str):
        value = _split(value.strip())
    if not isinstance(value, Iterable):
        return value
    return tuple(_read(number, key) for number, key in enumerate(value, start=1))


def _split(text: str) -> Any:
    if text.startswith("["):
        return json.loads(text)
    return [part.strip() for part in text.split(",")] if text else []


def _read(number: int, key: Any) -> Any:
    if isinstance(key, SecretStr):
        key = key.get_secret_value()
    if not isinstance(key, str):
        return key
    if key.startswith(_HASHED):
        return ApiKey(_given_digest(number, key.removeprefix(_HASHED)))
    if not FEWEST_CHARACTERS <= len(key) <= MOST_CHARACTERS:
        length = f"has {len(key)} characters" if key else "is empty"
        raise ValueError(
            f"key {number} {length}; a key has {FEWEST_CHARACTERS} to {MOST_CHARACTERS}, for "
            "example those that `openssl rand -hex 32` prints."
        )
    if not _SENDABLE.fullmatch(key):
        raise ValueError(
            f"key {number} has characters that an HTTP header cannot carry; allowed are printable "
            "ASCII characters, with spaces only inside."
        )
    return ApiKey(_digest(key))


def _given_digest(number: int, digits: str) -> bytes:
    if not _DIGEST.fullmatch(digits.lower()):
        raise ValueError(
            f"key {number} begins with 'sha256:'; 64 hexadecimal digits must follow, those of the "
            "key's SHA-256."
        )
    return bytes.fromhex(digits)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
