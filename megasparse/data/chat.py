"""Conversations as text: the chat template of a tokenizer, or a plain one.

    template = load_template("data/tokenizer.json") or PlainTemplate()
    template.parts([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
    # [("User: 2 + 2?\\nAssistant:", False), (" 4\\n", True)]: text, and whether it is of the assistant

A part of the assistant is what the template puts behind its invitation to answer (`add_generation_prompt`), so that a
model is trained on exactly what it is to write after exactly what it is asked with. Templates are those of Hugging
Face: Jinja, run in its sandbox, from chat_template.jinja or tokenizer_config.json beside the tokenizer's file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

Message = Mapping[str, Any]
Part = tuple[str, bool]

PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
GUARD = "\ufdd0"
"""No character of Unicode: stands inside whatever in a message spells a special token, so that only the template's own
ones are special."""


class Template(Protocol):
    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The text of a conversation that ends with an answer, in parts; ValueError where it has none."""


class PlainTemplate:
    """`System: ...`, `User: ...` and `Assistant: ...`, a line each."""

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        parts: list[Part] = []
        asked = ""
        for role, content in map(_checked, messages):
            if role not in PLAIN_NAMES:
                raise ValueError(f"role {role!r}; must be one of {', '.join(PLAIN_NAMES)} in the plain template")
            asked += f"{PLAIN_NAMES[role]}:"
            if role == "assistant":
                parts += [(asked, False), (f" {content}\n", True)]
                asked = ""
            else:
                asked += f" {content}\n"
        return _ending_with_an_answer(parts, asked)


class JinjaTemplate:
    """A template of Hugging Face. special: tokens that it may write and messages may not.

    ValueError where `jinja2` is missing or the text is no template.
    """

    def __init__(self, source: str, variables: Mapping[str, str], special: Sequence[str] = ()) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ValueError("a chat template needs the library jinja2: pip install jinja2") from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        self._errors = (TemplateError, TypeError)
        self._special, self._variables = sorted(special, key=len, reverse=True), dict(variables)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template is not readable ({error})") from error

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        guarded = [{**message, "content": self._guarded(_checked(message)[1])} for message in messages]
        parts: list[Part] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(guarded[:number], add_generation_prompt=True)
            answered = self._render(guarded[: number + 1], add_generation_prompt=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise ValueError(
                    f"message {number}: the chat template writes what comes before it otherwise once it is answered; "
                    "must be a template that only appends, or the plain one (--template plain)"
                )
            parts += [(asked[len(done) :], False), (answered[len(asked) :], True)]
            done = answered
        return _ending_with_an_answer(parts, "" if messages and messages[-1]["role"] == "assistant" else "more")

    def _guarded(self, content: str) -> str:
        if GUARD in content:
            raise ValueError("a message holds U+FDD0, which is no character; must be text")
        for token in self._special:
            content = content.replace(token, token[0] + GUARD + token[1:])
        return content

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._variables
            )
        except self._errors as error:
            raise ValueError(f"the chat template refuses it ({error})") from error


def load_template(tokenizer_path: str | PathLike[str], special: Sequence[str] = ()) -> JinjaTemplate | None:
    """The template beside a tokenizer's file, None where there is none. ValueError for one that cannot be used."""
    folder = Path(tokenizer_path).parent
    config = _read_config(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template: {source!r}; must be text")
    names = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}
    return JinjaTemplate(source, {key: value for key, value in contents.items() if isinstance(value, str)}, special)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    return values if isinstance(values, dict) else {}


def _checked(message: Message) -> tuple[str, str]:
    """Role and content."""
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"message {message!r}; must have a role and a content, both text")
    return role, content


def _ending_with_an_answer(parts: list[Part], rest: str) -> list[Part]:
    if not parts or rest:
        raise ValueError("the last message is not of the assistant; must be, as its answers are what is learned")
    return parts


def _refuse(message: str) -> None:
    raise ValueError(message)
