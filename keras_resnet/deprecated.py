"""Names of version 0.1 that have changed. They work for one more version, with a `DeprecationWarning` that says the new name."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

_FAMILIES = ("akamaster", "keras_applications", "keras_hub", "native", "small", "timm", "torchvision")
_FORMATS = ("kerasfile", "reading", "safetensors", "tensors", "torchfile")

# Modules that have moved, by their paths below the package.
MOVED = {
    "assembly": "zoo.assembly",
    "build": "models.build",
    "config": "zoo.config",
    "counting": "zoo.counting",
    "growth.blocks": "blocks",
    "growth.gates": "blocks.gates",
    "growth.places": "growth.points",
    "growth.signs": "blocks.signs",
    "hints": "checks",
    "plan": "zoo.plan",
    "pretrained": "models.pretrained",
    "registry": "models.registry",
    "resnet": "zoo.resnet",
    "transfer": "models.transfer",
    "variants": "zoo.variants",
    "vgg": "zoo.vgg",
    "weights.origin": "weights.families.checkpoint_format",
    **{f"weights.{name}": f"weights.families.{name}" for name in _FAMILIES},
    **{f"weights.{name}": f"weights.formats.{name}" for name in _FORMATS},
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules at their old paths, once the usual finders have found nothing there."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and rest in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = moved_module(module.__name__.partition(".")[2])
        vars(module).update({name: value for name, value in vars(new).items() if not name.startswith("__")})


def moved_module(old: str) -> ModuleType:
    """Import a module by the path below the package that it had in version 0.1; warns the caller's caller."""
    new = f"{__package__}.{MOVED[old]}"
    warnings.warn(f"module '{__package__}.{old}' was renamed to {new!r}", DeprecationWarning, stacklevel=3)
    return importlib.import_module(new)


def find_moved_modules() -> None:
    """Let `import` find modules at the paths that they had in version 0.1."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


def old_arguments(translate: Callable[[dict[str, Any]], tuple[dict[str, Any], str] | None]) -> Callable[[Class], Class]:
    """Let a class take keyword arguments of version 0.1; its signature shows the new ones only.

    Args:
        translate: Takes the keyword arguments, and returns the new ones and a message, or None where there are no old ones.

    Returns:
        Class decorator.
    """

    def decorate(cls: Class) -> Class:
        init = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if (found := translate(kwargs)) is not None:
                kwargs, message = found
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            init(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]
        return cls

    return decorate
