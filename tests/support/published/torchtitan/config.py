"""Configurations that build what they are nested in, and overrides that replace them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar


class Configurable:
    """Has a nested Config, whose `build` makes it."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None

        def build(self) -> Any:
            return self._owner(config=dataclasses.replace(self))

        def traverse(self, kind: type) -> Iterator[tuple[str, Any, Any, str]]:
            """Name, configuration, parent and attribute of every one of that kind."""
            for one in dataclasses.fields(self):
                value = getattr(self, one.name)
                if isinstance(value, kind):
                    yield one.name, value, self, one.name

    def __init_subclass__(cls) -> None:
        config = vars(cls).get("Config")
        if config is not None:
            assert "__slots__" in vars(config), f"{cls.__name__}.Config needs slots=True"
            config._owner = cls


@dataclass(kw_only=True, slots=True)
class OverrideConfig:
    imports: list[Any] = field(default_factory=list)


_registered: dict[str, tuple[type, Callable[..., Any]]] = {}


def override(
    *, target: type, fqns: list[str] | None = None, description: str = "", exact: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function that replaces configurations of a kind, by its dotted name."""
    assert issubclass(target, Configurable.Config)

    def register(factory: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{factory.__module__}.{factory.__name__}"
        if name in _registered:
            raise ValueError(f"{name} is already registered")
        _registered[name] = (target, factory)
        return factory

    return register


def derive(source: Any, target_cls: Any, **deltas: Any) -> Any:
    """A `target_cls` with the fields that both have, and the deltas."""
    names = {one.name for one in dataclasses.fields(target_cls)}
    if set(deltas) - names:
        raise ValueError(f"unknown fields: {sorted(set(deltas) - names)}")
    common = {one.name: getattr(source, one.name) for one in dataclasses.fields(source)}
    return target_cls(**{**{k: v for k, v in common.items() if k in names}, **deltas})


def apply_overrides(overrides: OverrideConfig, root: Any) -> list[str]:
    """Replaces what the imported overrides claim."""
    done = []
    for entry in overrides.imports:
        name, options = (entry, {}) if isinstance(entry, str) else entry
        importlib.import_module(name.rpartition(".")[0])
        if name not in _registered:
            raise ValueError(f"{name} names no registered override")
        target, factory = _registered[name]
        for path, config, parent, attribute in list(root.traverse(target)):
            setattr(parent, attribute, factory(config, **options))
            done.append(path)
    return done
