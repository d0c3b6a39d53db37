"""From files and command-line words to one checked ``RunConfig``.

    config = load_config(["configs/quickstart.yaml"], ["train.steps=200", "sparsity.algorithm=set"])

Precedence, lowest first: defaults of the schema, the file named by ``base`` in a YAML file (relative to that file, or a
list of them), the file itself, later files, dotted overrides from left to right. Lists and values replace; sections
merge. OmegaConf reads and merges (it reads ``1e-4`` as a number, which plain YAML does not); pydantic checks.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megasparse.config.renamed import REMOVED_SETTINGS, RENAMED_SETTINGS, RENAMED_VALUES
from megasparse.config.schema import RunConfig
from megasparse.utils.files import write_at_once

Schema = TypeVar("Schema", bound=BaseModel)

# Where a field has several types, pydantic adds the one that it tried to the place of an error.
CHOICE = re.compile(r"(list|literal|tuple|dict)\[.*\]$|constrained-")

TOO_DEEP = "settings nested too deeply; must be sections of values and lists"
REFERENCE = re.compile(r"\$\{\s*[\w.\[\]]+\s*\}")
"""${section.field}: another setting."""


class ConfigError(ValueError):
    """A setting that is unknown or impossible; the message names field, value and what it must be."""


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and check. Raises ConfigError naming the field, its value and what it must be."""
    try:
        files = [_read_with_bases(Path(path), seen=()) for path in paths]
        merged = _merge(*files, *map(_parse_override, overrides))
        # Values may name others: run.name: quickstart-${sparsity.algorithm}.
        _refuse_resolvers(OmegaConf.to_container(merged, resolve=False))
        plain = OmegaConf.to_container(merged, resolve=True)
        assert isinstance(plain, dict)
        return check_config({str(name): value for name, value in plain.items()})
    except OmegaConfBaseException as error:
        raise ConfigError(f"a value that names another: {error}") from None
    except RecursionError:
        raise ConfigError(TOO_DEEP) from None


def given_settings(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> set[str]:
    """Dotted names of the settings that files and overrides name, and those that have a default left out."""
    files = [_read_with_bases(Path(path), seen=()) for path in paths]
    plain = OmegaConf.to_container(_merge(*files, *map(_parse_override, overrides)), resolve=False)
    assert isinstance(plain, dict)
    return {name for name, _ in dotted_values(plain)}


def check_config(values: dict[str, Any]) -> RunConfig:
    """A ``RunConfig`` from nested plain values, as found in YAML. Raises ConfigError."""
    return check_values(RunConfig, values)


def check_values(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """An instance of a strict model from nested plain values. Raises ConfigError."""
    try:
        _refuse_control_characters(values)
        # JSON mode reads lists as tuples and whole numbers as floats, yet takes no string for a number.
        return schema.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(details, schema) for details in error.errors())) from None
    except TypeError as error:
        raise ConfigError(f"settings must be text, numbers, true, false, null, lists and sections: {error}") from None
    except RecursionError:
        raise ConfigError(TOO_DEEP) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, every field included, as YAML that ``load_config`` reads back."""
    write_at_once(path, to_yaml(config))


def to_yaml(config: RunConfig) -> str:
    # OmegaConf quotes a name like 1e5, which it reads as a number and plain YAML does not.
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def changed_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """What two configurations differ in, such as `train.steps: 600 -> 800`, in the order of the schema."""
    sections = [(name, getattr(before, name), getattr(after, name)) for name in RunConfig.model_fields]
    return [
        f"{section}.{field}: {getattr(old, field)} -> {getattr(new, field)}"
        for section, old, new in sections
        for field in type(old).model_fields
        if getattr(old, field) != getattr(new, field)
    ]


def describe_fields() -> Iterator[tuple[str, str, str]]:
    """Dotted name, default and help of every field, in the order of the schema."""
    for section_name, section in RunConfig():
        for name, field in type(section).model_fields.items():
            description = " ".join((field.description or "").split())
            yield f"{section_name}.{name}", json.dumps(getattr(section, name)), description


def dotted_values(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested settings as text; lists as JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted_values(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            yield f"{prefix}{name}", text


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"base: {path} builds on itself, by way of {' -> '.join(p.name for p in seen)}")
    if not path.is_file():
        raise ConfigError(f"--config: no such file: {path}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        # A base may be any file, somebody's keys for instance: nothing of it is repeated.
        reason = _place_in_file(error) if seen else str(error)
        raise ConfigError(f"{path}: not readable as YAML: {reason}") from None
    if not isinstance(content, DictConfig) or _is_bare_text(content):
        found = "text" if isinstance(content, DictConfig) else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: must hold sections such as `train:`, found {found}")
    plain: Any = OmegaConf.to_container(OmegaConf.create({"base": content.pop("base", [])}), resolve=False)
    found = plain["base"]
    bases = [found] if isinstance(found, str) else found
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base: {found!r} in {path}; must be a file name or a list of file names")
    return _merge(*(_read_with_bases(path.parent / base, (*seen, path)) for base in bases), content)


def _place_in_file(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{type(error).__name__}{f', line {mark.line + 1}' if mark else ''}"


def _is_bare_text(content: DictConfig) -> bool:
    """OmegaConf takes a text for the name of a setting without a value."""
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    return list(plain.values()) == [None] and not plain.keys() & {"base", *RunConfig.model_fields}


def _refuse_resolvers(plain: Any) -> None:
    """A value may name another setting. OmegaConf could do more, such as read the environment, which may hold keys."""
    for name, text in _texts(plain):
        if "${" in REFERENCE.sub("", text):
            raise ConfigError(f"{name}: {text!r}; a value may only name another setting, as ${{run.name}} does")


def _refuse_control_characters(values: Any) -> None:
    """Names and paths become lines of scripts and of consoles. What a model reads may be any text."""
    for name, text in _texts(values):
        if not name.endswith("train.sample_prompt") and (found := control_character(text)):
            raise ConfigError(f"{name}: {text!r} holds the control character {found!r}; must be one line of plain text")


def control_character(text: str) -> str | None:
    """The first character that ends a line or steers a terminal."""
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None)


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested values, names of settings too, with the dotted name of its place."""
    if isinstance(values, str):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield name or "settings", str(key)
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _texts(value, f"{name}.{number}")


def _parse_override(word: str) -> DictConfig:
    name, separator, _ = word.partition("=")
    if not separator or not name or name.startswith("-"):
        raise ConfigError(f"{word!r}: an override must read section.field=value, for example train.steps=200")
    try:
        return OmegaConf.from_dotlist([word])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{word!r}: the value is not readable as YAML: {error}") from None


def _merge(*settings: DictConfig) -> DictConfig:
    """Later ones win."""
    try:
        merged = OmegaConf.merge({}, *settings)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"settings that cannot be merged: {error}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _describe(details: ErrorDetails, schema: type[BaseModel]) -> str:
    """One line for one pydantic error: field, value, and what it must be."""
    location = ".".join(str(part) for part in details["loc"] if not CHOICE.match(str(part)))
    setting = ".".join(part for part in details["loc"] if isinstance(part, str))
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        if setting in RENAMED_SETTINGS:
            return f"{location}: was renamed; must be given as {RENAMED_SETTINGS[setting]}"
        if setting in REMOVED_SETTINGS:
            return f"{location}: was removed: {REMOVED_SETTINGS[setting]}; must be left out"
        return f"{location}: unknown setting; {_suggest(details['loc'], schema)}"
    if kind == "value_error":
        return f"{location}.{context['error']}" if location else str(context["error"])
    value = json.dumps(details["input"], default=str)
    if kind == "literal_error":
        if new_value := RENAMED_VALUES.get((setting, str(details["input"]))):
            return f"{location}: {value} was renamed; must be given as {new_value}"
        return f"{location}: {value} is not allowed; must be one of {context['expected']}"
    return f"{location}: {value} is not allowed; {details['msg'].replace('Input should', 'it should')}"


def _suggest(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The known names at the place of an unknown one below `model`, the likeliest first."""
    for part in location[:-1]:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        nested = _models_inside(model.model_fields[part].annotation)
        if nested:
            model = nested[0]
    names = sorted(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}must be one of {', '.join(names)}"


def _models_inside(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_inside(argument)]
