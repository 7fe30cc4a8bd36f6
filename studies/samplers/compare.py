"""Compare samplers of your choice, including your own, at equal numbers of evaluations.

    python -m studies.samplers.compare --plugin mine.py '{"name": "mine", "strength": 0.5}' unipc

It prints the relative error of the latents as in ``docs/samplers.md``: against a reference of many
steps, for the same images and noise, from the noisiest trained level to the cleanest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from server.plugin_files import register
from weft_plugins import PluginError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Register the plug-ins, then compare."""
    named = argparse.ArgumentParser(prog="python -m studies.samplers.compare", add_help=False)
    named.add_argument(
        "--plugin",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="Python file with samplers or spacings of your own; repeat it for several",
    )
    try:
        register(named.parse_known_args(arguments)[0].plugin)
    except PluginError as error:
        named.error(str(error))
    # The following imports the registries, so plug-ins must be registered by now.
    from studies.samplers.comparison import compare

    whole = argparse.ArgumentParser(prog=named.prog, parents=[named])
    compare(whole, arguments)


if __name__ == "__main__":
    main()
