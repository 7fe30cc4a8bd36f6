"""Registration of the operator's plug-in files, before the registries are built."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Final

from weft_plugins import VARIABLE, PluginError, classes_of, origin_of, plugin_files

__all__ = ["register"]

REGISTRIES: Final = ("samplers.registry", "samplers.spacings", "guidance.registry")


def register(files: Iterable[Path] = ()) -> dict[Path, list[str]]:
    """Build the registries with the classes of files; call this before anything imports them.

    Args:
        files: paths of the files. If there are none, those that the environment names are used.

    Returns:
        The names of the classes by which requests choose them, by file.

    Raises:
        PluginError: a file cannot be used, or defines nothing to register.
    """
    if named := [os.path.abspath(os.path.expanduser(one)) for one in files]:
        # The registries read it, and so do those of processes that this one starts.
        os.environ[VARIABLE] = json.dumps(named)
    found = plugin_files()
    if not found:
        return {}
    from guidance import ClassifierGuidance, Perturbation, Policy, Rule, StepCache
    from samplers import Sampler, Spacing

    kinds = (Sampler, Spacing, Rule, Policy, Perturbation, ClassifierGuidance, StepCache)
    classes = {file: [one for kind in kinds for one in classes_of(file, kind)] for file in found}
    for file, own in classes.items():
        if not own:
            raise PluginError(
                f"The plug-in {file} cannot be used: it defines no public class that is a "
                f"{', '.join(kind.__name__ for kind in kinds[:-1])} or {kinds[-1].__name__}."
            )
    for registry in REGISTRIES:
        import_module(registry)
    if late := [file for file, own in classes.items() if any(not origin_of(one) for one in own)]:
        raise PluginError(
            f"The plug-in {late[0]} cannot be used: the registries were built before it was named; "
            f"name it in {VARIABLE}."
        )
    return {
        file: [one.model_fields["name"].default for one in own] for file, own in classes.items()
    }
