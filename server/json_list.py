"""Parsing of JSON lists in the operator's settings."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["json_list"]


def json_list(text: str) -> Any:
    """Parse a text that begins like a list.

    Raises:
        ValueError: it is not JSON; the message does not repeat the text, which may be secret.
    """
    try:
        return json.loads(text)
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except ValueError:
        reason = "a number in it is too long"
    raise ValueError(f"it begins with [ but is not a JSON list: {reason}.")
