"""Makes docs/reference.md from the flags, the settings and the docstrings: `make reference`.

python docs/reference.py           writes it
python docs/reference.py --check   exit code 1 if it is stale
"""

import ast
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cyclopts import App
from pydantic import BaseModel

import tidemill
from tidemill.flows.cli import app
from tidemill.tasks import settings
from tidemill.tasks.training import spec

PAGE: Final = Path(__file__).with_name("reference.md")
HEAD: Final = """# Reference

Made by `make reference` from the flags, the settings and the docstrings: change those, not this page.

[Command line](#command-line) · [the spec](#the-spec) · [settings of a batch run](#settings-of-a-batch-run) ·
[settings of an online run](#settings-of-an-online-run) · [settings of a server](#settings-of-a-server) · [Python](#python)
"""
SPEC: Final = (
    "Fields of the spec: flags of `train`, keys of the file behind `--spec`, and arguments of `tidemill.Spec`."
)


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## Command line\n", *(_command(name) for name in app if not name.startswith("-"))]
    parts += [f"## The spec\n\n{SPEC}\n", *_tables(spec.Spec)]
    parts += ["## Settings of a batch run\n", *_tables(settings.BatchSettings)]
    parts += ["## Settings of an online run\n", *_tables(settings.OnlineSettings)]
    parts += ["## Settings of a server\n", *_tables(settings.ServeSettings)]
    parts += ["## Python\n\nNames of the package `tidemill`.\n", *(_name(name) for name in tidemill.__all__)]
    return "\n".join(parts)


# ---- the command line ------------------------------------------------------------------------------------------------
def _command(name: str) -> str:
    """Its docstring, and the flags that are not settings of the spec or of a run, which have tables of their own."""
    command = app[name]
    fields = {
        *(*_flags(spec.Spec), *_flags(settings.BatchSettings)),
        *(*_flags(settings.OnlineSettings), *_flags(settings.ServeSettings)),
    }
    rows = []
    for argument in command.assemble_argument_collection():
        if not argument.show or argument.name in fields or argument.name.removeprefix("--").partition(".")[0] in fields:
            continue
        given = " ".join(f"`{one}`" for one in argument.names)
        rows.append((given, _one_line(argument.parameter.help or "")))
    words, examples = _split(command)
    lines = [f"### tidemill {name}\n", words]
    if rows:
        lines += [_table(("argument", "meaning"), rows)]
    if examples:
        lines += [f"```text\n{examples}\n```\n"]
    return "\n".join(lines)


def _split(command: App) -> tuple[str, str]:
    """(the words of a command's help, its examples)."""
    words, _, examples = inspect.cleandoc(str(command.help)).partition("For example:")
    return f"{_markdown(words)}\n", inspect.cleandoc(examples).strip()


def _flags(model: type[BaseModel]) -> set[str]:
    return {name.replace("_", "-") for name in model.model_fields}


# ---- settings --------------------------------------------------------------------------------------------------------
def _tables(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The table of a model's fields, and those of the models among them."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        whole = f"{path}{name}"
        rows.append((f"`{whole}`", _type(field.annotation), _default(field), _one_line(field.description or "")))
        inner += [(part, f"{whole}.") for part in _models(field.annotation)]
    if path:
        yield f"### {path.removesuffix('.')}\n\n{_markdown(inspect.cleandoc(model.__doc__ or ''))}\n"
    yield _table(("setting", "type", "default", "meaning"), rows)
    for part, below in inner:
        yield from _tables(part, below)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _type(annotation: Any) -> str:
    """An annotation in plain words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(dict.fromkeys(_type(part) for part in arguments if part is not types.NoneType))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "settings"
    return {str: "text", bool: "yes or no", int: "whole number", float: "number"}.get(annotation, "value")


def _default(field: Any) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None or value == () or value == {} or isinstance(value, BaseModel):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# ---- Python ----------------------------------------------------------------------------------------------------------
def _name(name: str) -> str:
    value = getattr(tidemill, name)
    lines = [f"### {name}\n"]
    if not inspect.isclass(value):
        lines.append(f"```text\n{name}{_signature(value)}\n```\n")
    lines.append(f"{_markdown(inspect.cleandoc(value.__doc__ or ''))}\n")
    if inspect.isclass(value) and issubclass(value, BaseModel) and (rows := _attributes(value)):
        lines.append(_table(("attribute", "type", "meaning"), rows))
    return "\n".join(lines)


def _signature(function: Any) -> str:
    """One parameter a line; of a default that is an object, its kind."""
    lines = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if isinstance(default, BaseModel):
            shown = f" = {type(default).__name__}()"
        elif callable(default) and default is not parameter.empty:
            shown = f" = {default.__name__}"
        else:
            shown = "" if default is parameter.empty else f" = {default!r}"
        lines += ["    *,"] if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines else []
        lines.append(f"    {parameter.name}: {_annotation(parameter.annotation)}{shown},")
    result = _annotation(inspect.signature(function).return_annotation)
    return "\n".join(["(", *lines, f") -> {result}"])


def _annotation(annotation: Any) -> str:
    """A type as it is written, without the modules that it lives in."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b\w+\.", "", text).replace("'", "").replace("|", "\\|")


def _attributes(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """(name, type, meaning) of what a result has; settings have their tables above."""
    if issubclass(model, settings.BatchSettings.__mro__[1] | spec.Spec.__mro__[1]):  # the bases of all settings
        return []
    body = ast.parse(inspect.getsource(model)).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings = {}
    for one, following in itertools.pairwise(body.body):
        if (
            isinstance(one, ast.AnnAssign)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            meanings[ast.unparse(one.target)] = _one_line(str(following.value.value))
    return [
        (f"`{name}`", f"`{_annotation(field.annotation)}`", meanings.get(name, ""))
        for name, field in model.model_fields.items()
    ]


def _markdown(docstring: str) -> str:
    """A docstring as Markdown: `Args:`, `Returns:` and `Raises:` become lists; examples, blocks."""
    out: list[str] = []
    section = example = False
    for line in docstring.strip().splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        if heading:
            section = True
            out += [f"**{heading[1]}**", ""]
        elif section and re.match(r"    \S", line):
            term, colon, rest = line.strip().partition(": ")
            out.append(f"- `{term}`: {rest}" if colon and " " not in term else f"- {line.strip()}")
        elif section and line.strip():
            out.append(f"  {line.strip()}")
        elif line.startswith("    "):
            out += [] if example else ["```text"]
            example = True
            out.append(line[4:])
        else:
            out += ["```"] if example else []
            example = False
            section = section and not line
            out.append(line)
    return "\n".join(out + (["```"] if example else []))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE} is stale: make reference")
    PAGE.write_text(page())
