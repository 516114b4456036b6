"""A package whose names load their modules when they are asked for (PEP 562)."""

from collections.abc import Callable, Mapping, MutableMapping
from importlib import import_module


def loader(
    package: str, modules: Mapping[str, tuple[str, ...]], names: MutableMapping[str, object]
) -> Callable[[str], object]:
    """Return the `__getattr__` of a package.

    Args:
        package: its name.
        modules: the names that each of its modules has for it.
        names: its `globals()`, where a name is kept once it is loaded.
    """
    module_of = {name: module for module, found in modules.items() for name in found}

    def load(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        names[name] = getattr(import_module(f"{package}.{module_of[name]}"), name)
        return names[name]

    return load
