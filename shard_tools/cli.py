"""Reads the command line of every command, checks it, and calls the command's function.

What Fire read is checked against the function's signature first: Fire itself would complain about a misspelt flag
after the call.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from shard_tools.core.text import printable

LONGEST, WORD = 2000, 500  # characters of a message, and of a word in it
Result = TypeVar("Result")
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Range:
    """The numbers that an option can be: ``Annotated[int, Range(1, 64)]``; ge, le: inclusive bounds, gt, lt: exclusive.
    """

    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    lt: float | None = None

    def __contains__(self, number: float) -> bool:
        checks = ((self.ge, operator.ge), (self.le, operator.le), (self.gt, operator.gt), (self.lt, operator.lt))
        return number == number and all(check(number, bound) for bound, check in checks if bound is not None)

    def __str__(self) -> str:
        low = f"above {self.gt:,}" if self.gt is not None else f"{self.ge:,}" if self.ge is not None else ""
        high = f"below {self.lt:,}" if self.lt is not None else f"{self.le:,}" if self.le is not None else ""
        return f"{low} to {high}" if low and high else f"at most {high}" if high else (
            low if self.gt is not None else f"{low} or more")


class Option(NamedTuple):
    """One flag: its name, type annotation, default (``inspect.Parameter.empty`` when required), help line and range."""

    name: str
    type: Any
    default: Any
    help: str
    range: Range | None = None


def read_words(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits a command line into positional words and flags, every value as the text that was typed."""
    import fire  # here: commands are imported as functions, too
    from fire import decorators
    typed: dict[str, Any] = {}

    @decorators.SetParseFn(str)
    def collect(*words: str, **flags: str) -> None:
        typed.update(words=list(words), flags=flags)

    # torchrun needs a "--" before flags that are beginnings of its own, such as --run, and passes it on.
    fire.Fire(collect, command=list(argv)[argv[:1] == ["--"]:], name="command")
    return typed["words"], typed["flags"]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A phrase naming the closest allowed word, or all of them when none is close."""
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(sorted(allowed))}"


def coerce(name: str, value: Any, annotation: Any) -> Any:
    """Converts a typed word or a YAML value into the annotated type; the ValueError names option, found and expected.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None or str(value).lower() == "none":
            return None
        return coerce(name, value, next(kind for kind in inner if kind is not type(None)))
    if origin is typing.Literal:
        if value is False and "no" in inner:  # YAML reads a bare `no` so
            return "no"
        if value not in inner:
            raise ValueError(f"--{name}: {value!r} is not a choice, {nearest(str(value), map(str, inner))}")
        return value
    if origin is tuple:
        parts = value if isinstance(value, (list, tuple)) else str(value).strip("()[]").split(",")
        if inner[-1] is not Ellipsis and len(parts) != len(inner):
            raise ValueError(f"--{name}: expected {len(inner)} values separated by commas, found {value!r}")
        return tuple(coerce(name, part, inner[0]) for part in parts)
    if annotation is bool:
        if str(value).lower() in BOOLEANS:
            return BOOLEANS[str(value).lower()]
    elif annotation in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if annotation is float:
                return number
            if number == int(number):
                return int(value) if re.fullmatch(r"[+-]?\d+", str(value)) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    elif annotation is str and not isinstance(value, (dict, list)) and value not in ("True", None):
        return str(value)
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a value"}.get(annotation, annotation)
    raise ValueError(f"--{name}: expected {kind}, found {'nothing' if value in ('True', None) else repr(value)}")


def check_range(name: str, value: Any, allowed: Range | None) -> None:
    """Raises ValueError for a number, or one of several, that an option can't be."""
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if allowed is not None and number is not None and number not in allowed:
            raise ValueError(f"--{name} {number}: expected {allowed}")


def checked(command: Callable[..., Result]) -> Callable[..., Result]:
    """A command that checks the numbers it is called with against the ranges of its annotations, before anything else.
    """
    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> Result:
        given = inspect.signature(command).bind(*args, **kwargs).arguments
        for option in options_of(command):
            check_range(option.name, given.get(option.name), option.range)
        return command(*args, **kwargs)
    return call


def check_names(given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ValueError for the first name that is not an option, with the nearest one."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise ValueError(f"unknown option --{name}, {nearest(name, allowed)}")


def options_of(function: Callable) -> list[Option]:
    """The options of a command: its signature joined with the ``Args:`` section of its docstring."""
    helps, current = {}, None
    for line in inspect.getdoc(function).partition("Args:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.match(r" {4}(\w+): (.*)", line):
            current = match[1]
            helps[current] = match[2]
        elif current and line.strip():
            helps[current] += " " + line.strip()
    kinds, hints = (typing.get_type_hints(function, include_extras=extras) for extras in (False, True))
    ranges = {name: next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)), None)
              for name, hint in hints.items()}
    return [Option(name, kinds[name], parameter.default, helps.get(name, ""), ranges[name])
            for name, parameter in inspect.signature(function).parameters.items()]


def describe(options: Iterable[Option]) -> str:
    """The options as text, one a paragraph: flag, type, help and default."""
    lines = []
    for name, kind, default, text, allowed in options:
        shown = "|".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else (
            getattr(kind, "__name__", None) if not typing.get_args(kind) else str(kind).replace(" | None", ""))
        required = default is inspect.Parameter.empty
        numbers = f" ({allowed})" if allowed else ""
        lines.append(f"  --{name} {shown}{numbers}{'  (required)' if required else ''}")
        lines.append(f"        {text}{'' if required else f' [default: {default}]'}")
    return "\n".join(lines)


def bind(function: Callable, words: list[str], flags: dict[str, str]) -> dict[str, Any]:
    """The checked keyword arguments of a command from the words and flags that were typed."""
    options = {option.name: option for option in options_of(function)}
    check_names(flags, options)
    flags = dict(flags)
    for name, value in list(flags.items()):
        if options[name].type is bool and value.lower() not in BOOLEANS:  # `--full DIR`: the word is not the flag's
            flags[name] = "True"
            words = [*words, value]
    for word in words:
        free = next((name for name in options if name not in flags), None)
        if free is None:
            raise ValueError(f"unexpected word {word!r}")
        flags[free] = word
    missing = [n for n, o in options.items() if o.default is inspect.Parameter.empty and n not in flags]
    if missing:
        raise ValueError(f"missing {', '.join('--' + name for name in missing)} (see --help)")
    return {name: coerce(name, value, options[name].type) for name, value in flags.items()}


def guarded(call: Callable[[], int | None]) -> typing.NoReturn:
    """Runs a call as a process: its status as exit code; errors a person can mend as one line and exit code 2."""
    try:
        sys.exit(call() or 0)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("Symlink loop"):  # of pathlib in Python < 3.13
            raise
        print(f"error: {readable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def readable(text: str) -> str:
    """A message that may quote what files hold: control characters as escapes, and no more than anybody reads."""
    short = re.sub(rf"(\S{{{WORD}}})\S+", r"\1...", text[:100 * LONGEST])[:LONGEST]
    return "\n".join(map(printable, short.split("\n"))) + ("..." if len(text) > LONGEST else "")


def joined(argv: Sequence[str], several: Sequence[str], bare: Sequence[str] = ()) -> list[str]:
    """The command line with the words that follow some flags, as from ``--audio *.npy``, joined to one by commas.

    ``bare``: flags that may stand without a word, which then is the empty one.
    """
    found: list[str] = []
    begun = False
    for word in argv:
        if begun and not word.startswith("-") and (not found[-1].startswith("--") or "=" in found[-1]):
            found[-1] += f",{word}"
            continue
        begun = word.partition("=")[0] in [f"--{name}" for name in several] or (begun and not word.startswith("-"))
        if found and found[-1] in [f"--{name}" for name in bare] and word.startswith("-"):
            found[-1] += "="
        found.append(word)
    if found and found[-1] in [f"--{name}" for name in bare]:
        found[-1] += "="
    return found


def run(function: Callable[..., int | None], argv: Sequence[str] | None = None, several: Sequence[str] = (),
        bare: Sequence[str] = (), name: str | None = None) -> typing.NoReturn:
    """Runs ``function`` as the command that this process is, with ``--help`` made from its signature and docstring.

    ``several``: flags that take several words; ``bare``: that may stand without any; ``name``: of the command, if more
    than the module's.
    """
    def call() -> int | None:
        words, flags = read_words(joined(sys.argv[1:] if argv is None else argv, several, bare))
        if {"help", "h"} & set(flags):
            intro = inspect.getdoc(function).partition("Args:\n")[0].strip()
            options = options_of(function)
            needed = " ".join(f"--{o.name} {o.name.upper()}" for o in options if o.default is inspect.Parameter.empty)
            command = " ".join(filter(None, [name or command_name(), needed, "[options]"]))
            print(f"usage: python -m {command}\n"
                  f"(words without a flag fill the options in their order)\n\n{intro}\n\n{describe(options)}")
            return 0
        return function(**bind(function, words, flags))
    guarded(call)


def command_name() -> str:
    """The dotted name under which this process was started with ``python -m``."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
