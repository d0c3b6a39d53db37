"""The reference of all settings as Markdown, made from the schema itself.

    text = replace_reference(Path("configs/README.md").read_text(encoding="utf-8"), render_reference())

``tools/write_config_reference.py`` writes it between two marker comments of configs/README.md; a test keeps it current.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megasparse.config.schema import RunConfig

BEGIN = "<!-- begin of the generated reference: tools/write_config_reference.py -->"
END = "<!-- end of the generated reference -->"
HEADER = ("| field | must be | default | meaning |", "|---|---|---|---|")
WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def render_reference() -> str:
    """A table per section, then one per kind of list entry."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    sections = {name: _definition_name(field) for name, field in schema["properties"].items()}
    entries = sorted(set(definitions) - set(sections.values()))
    tables: list[tuple[str, str, list[str]]] = [(section, definition, []) for section, definition in sections.items()]
    tables += [(entry, entry, [_uses(entry, sections, definitions), ""]) for entry in entries]
    lines: list[str] = []
    for title, definition, note in tables:
        lines += [f"### `{title}`", "", *note, *HEADER]
        lines += [_row(name, field) for name, field in definitions[definition]["properties"].items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def replace_reference(page: str, reference: str) -> str:
    """`page` with `reference` between the markers. Raises ValueError where the page lacks them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no pair of lines `{BEGIN}` and `{END}`")
    return f"{before}{BEGIN}\n\n{reference}\n\n{END}{after}"


def _row(name: str, field: Mapping[str, Any]) -> str:
    default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
    cells = (f"`{name}`", _allowed_values(field), default, " ".join(field["description"].split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _allowed_values(field: Mapping[str, Any]) -> str:
    """What the JSON schema of a field allows, in a few words."""
    if "anyOf" in field:
        return " or ".join(_allowed_values(choice) for choice in field["anyOf"])
    if "$ref" in field:
        return f"`{_definition_name(field)}`"
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "null":
        return "`null`"
    if "prefixItems" in field:
        return f"[{', '.join(_allowed_values(item) for item in field['prefixItems'])}]"
    if field.get("type") == "array":
        return f"list of {_allowed_values(field['items'])}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        if not isinstance(values, dict):
            return "section"
        return f"section of {_allowed_values(field['propertyNames'])}: each {_allowed_values(values)}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    if "pattern" in field:
        bounds.append(f"matching `{field['pattern']}`")
    return " ".join([WORDS[field["type"]], ", ".join(bounds)]).strip()


def _definition_name(field: Mapping[str, Any]) -> str:
    reference = field.get("$ref") or field["allOf"][0]["$ref"]
    return reference.rpartition("/")[2]


def _uses(definition: str, sections: Mapping[str, str], definitions: Mapping[str, Any]) -> str:
    places = [
        f"`{section}.{name}`"
        for section, owner in sections.items()
        for name, field in definitions[owner]["properties"].items()
        if f'"#/$defs/{definition}"' in json.dumps(field)
    ]
    return f"An entry of {' and '.join(places)}."
