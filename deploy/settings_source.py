"""Settings from one file, the environment and the command line, in rising order of precedence.

Knows the formats (TOML, YAML, `EVERDRAFT__SECTION__KEY`), not the keys: those come from the settings
tree. Invariant: every error names the place a value came from, the value, and what follows from it.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from buffer.redaction import SECRET_NAME, redacted_url
from deploy.errors import SettingsError
from deploy.settings import Settings

ENV_PREFIX = "EVERDRAFT__"
CONSEQUENCE = "nothing was started"

_HIDDEN = "(hidden)"

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """One value and the place that it came from."""

    value: Any
    place: str

    def at(self, path: KeyPath) -> str:
        """`place: section.key=value`, for a message; secrets are not shown."""
        shown = next((_HIDDEN for key in path if SECRET_NAME.search(key)), _shown(self.value))
        return f"{self.place}: {'.'.join(path)}={shown if shown is _HIDDEN else repr(shown)}"


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Settings:
    """Settings of `overrides` (by section; None leaves a value alone), over environment, over file.

    Raises SettingsError with one line for each fault.
    """
    given: dict[KeyPath, Given] = {}
    if file is not None:
        given |= {path: Given(value, str(file)) for path, value in _leaves(_read(file), Settings)}
    given |= _from_environment(environment or {})
    for path, value in _leaves(overrides or {}, Settings):
        if value is not None:
            given[path] = Given(value, "the command line")
    faults = [
        fault for path, origin in given.items() if (fault := _unknown(path, origin) or _empty(path, origin))
    ]
    if faults:
        raise SettingsError("\n".join(faults))
    try:
        return Settings.model_validate(_tree(given))
    except ValidationError as error:
        raise SettingsError("\n".join(_faults(error, given))) from None


def _shown(value: Any) -> Any:
    """A value without what may be secret in it, wherever it was written by mistake."""
    if isinstance(value, Mapping):
        return {key: _HIDDEN if SECRET_NAME.search(str(key)) else _shown(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(part) for part in value]
    if isinstance(value, str):
        if SECRET_NAME.search(value):
            return _HIDDEN
        return redacted_url(value) if "@" in value or "://" in value else value
    return value


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".toml":
            return tomllib.loads(text)
        if file.suffix in {".yaml", ".yml"}:
            content = yaml.safe_load(text) or {}
            if isinstance(content, dict):
                return content
            raise ValueError("it holds no sections")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = _position(error) if isinstance(error, yaml.MarkedYAMLError) else error
        raise SettingsError(f"{file} cannot be read: {reason}; {CONSEQUENCE}") from None
    raise SettingsError(f"{file} must end in .toml, .yaml or .yml; {CONSEQUENCE}")


def _position(error: yaml.MarkedYAMLError) -> str:
    """Where the fault is. YAML's own message quotes the line, on which a key may stand."""
    mark = error.problem_mark
    return f"no YAML at line {mark.line + 1}, column {mark.column + 1}" if mark else "no YAML"


def _from_environment(environment: Mapping[str, str]) -> dict[KeyPath, Given]:
    return {
        tuple(name.removeprefix(ENV_PREFIX).lower().split("__")): Given(_parsed(text), name)
        for name, text in environment.items()
        if name.startswith(ENV_PREFIX)
    }


def _parsed(text: str) -> Any:
    """Lists, objects and null are written as JSON; everything else is taken as it stands."""
    if not text.startswith(("[", "{")) and text != "null":
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _leaves(tree: Mapping[str, Any], model: type[BaseModel] | None) -> Iterator[tuple[KeyPath, Any]]:
    """Every value with its path; goes down only where the settings tree has a section."""
    for key, value in tree.items():
        section = _section(model, str(key))
        if section is not None and isinstance(value, Mapping):
            yield from (((str(key), *path), leaf) for path, leaf in _leaves(value, section))
        else:
            yield (str(key),), value


def _section(model: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key) if model is not None else None
    if field is None or get_origin(field.annotation) is tuple:  # a list of entries is one value
        return None
    candidates = (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _unknown(path: KeyPath, given: Given) -> str | None:
    """What is wrong with a path that the settings tree does not have, or None."""
    model: type[BaseModel] | None = Settings
    for depth, key in enumerate(path):
        if model is None:
            return None
        if key not in model.model_fields:
            return _unknown_key(path, depth, model, given)
        model = _section(model, key)
    if model is not None:
        return f"{given.at(path)} is a section, not a value; {CONSEQUENCE}"
    return None


def _empty(path: KeyPath, given: Given) -> str | None:
    """An unset variable of a compose file arrives as an empty text, which some would take for a value: a host
    that is every interface, a folder that is this one. Of an empty key its own section says what to do."""
    if not isinstance(given.value, str) or given.value.strip() or SECRET_NAME.search(path[-1]):
        return None
    return f"{given.at(path)} is empty; leave it out for its default, or give a value; {CONSEQUENCE}"


def _unknown_key(path: KeyPath, depth: int, model: type[BaseModel], given: Given) -> str:
    close = difflib.get_close_matches(path[depth], model.model_fields, n=1, cutoff=0.5)
    parent = ".".join(path[:depth])
    if close:
        hint = f"did you mean {'.'.join((*path[:depth], close[0]))}?"
    else:
        hint = f"{parent or 'a settings file'} has " + ", ".join(model.model_fields)
    return f"{given.at(path)} is no setting ({hint}); {CONSEQUENCE}"


def _tree(given: Mapping[KeyPath, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {name: {} for name in Settings.model_fields}
    for path, origin in given.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = origin.value
    return tree


def _faults(error: ValidationError, given: Mapping[KeyPath, Given]) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        path = tuple(str(part) for part in fault["loc"])
        origin = next((given[path[:n]] for n in range(len(path), 0, -1) if path[:n] in given), None)
        name = ".".join(path)
        if fault["type"] == "missing":
            variable = ENV_PREFIX + "__".join(path).upper()
            yield f"{name} is missing (give it in the settings file or as {variable}); {CONSEQUENCE}"
        elif origin is None:
            yield f"{name}: {fault['msg']}; {CONSEQUENCE}"
        else:
            yield f"{origin.at(path)}: {fault['msg']}; {CONSEQUENCE}"
