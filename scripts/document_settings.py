"""Writes the table of settings in docs/operating.md from server/settings.py.

.venv/bin/python scripts/document_settings.py            # rewrite the table
.venv/bin/python scripts/document_settings.py --check    # exit with 1 if it is out of date
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.settings import Settings

PAGE: Final = Path(__file__).resolve().parent.parent / "docs/operating.md"
HEAD: Final = "| variable | default | allowed | meaning |\n|---|---|---|---|\n"
BOUNDS: Final = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The lines of the table for a model's fields, with a prefix for nested ones."""
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        if isinstance(field.default, BaseModel):
            yield from rows(type(field.default), f"{variable}__")
            continue
        cells = (f"`{variable}`", _default(field.default), _allowed(field), field.description or "")
        yield "| " + " | ".join(cells) + " |\n"


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(field: FieldInfo) -> str:
    if bool in (field.annotation, *get_args(field.annotation)):
        return "`true`, `false`"
    if get_origin(field.annotation) is not None:
        choices = [f"`{one}`" for one in get_args(field.annotation) if isinstance(one, str)]
        if choices:
            return ", ".join(choices)
    bounds = [
        text.format(f"{getattr(limit, kind):,}")
        for kind, text in BOUNDS.items()
        for limit in field.metadata
        if hasattr(limit, kind)
    ]
    return ", ".join(bounds)


def main() -> int:
    """Rewrites or checks the page; returns the exit status."""
    page = PAGE.read_text()
    before, _, rest = page.partition(HEAD)
    after = rest[rest.index("\n\n") + 1 :] if "\n\n" in rest else ""
    wanted = before + HEAD + "".join(rows(Settings, "WEFT_")) + after
    if page == wanted:
        return 0
    if "--check" in sys.argv:
        print(f"{PAGE.name} is out of date; run scripts/document_settings.py", file=sys.stderr)  # noqa: T201
        return 1
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
