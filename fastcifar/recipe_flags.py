"""Every option of `Recipe` as a flag: what `fastcifar.train` and `fastcifar.tune` share."""

from __future__ import annotations

import argparse
from typing import Any

from fastcifar import command_line
from fastcifar.training.options import flag, options


def parser(prog: str, description: str) -> command_line.Parser:
    """A parser of every option of `Recipe`, of --config and of --model-option; `given` reads what it parsed."""
    made = command_line.Parser(prog=prog, description=description)
    made.add_argument("-c", "--config", metavar="FILE", help="YAML file of options; flags win over it")
    kinds = {int: command_line.whole_number, float: command_line.number, str: str}
    groups: dict[str, Any] = {}
    for option in options():
        group = option.metadata["group"]
        if group not in groups:
            groups[group] = made.add_argument_group(group)
        names = ["-b", flag(option.name)] if option.name == "batch_size" else [flag(option.name)]
        settings: dict[str, Any] = {"dest": option.name, "default": None, "help": option.metadata["help"]}
        if option.metadata["kind"] is bool:
            settings["action"] = "store_true" if option.default is False else argparse.BooleanOptionalAction
        else:
            settings |= {"type": kinds[option.metadata["kind"]], "metavar": option.name.upper().split("_")[-1]}
            if "choices" in option.metadata:
                settings["help"] += f": {', '.join(option.metadata['choices'])}"
        groups[group].add_argument(*names, **settings)
    groups["what"].add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the network, such as activation=silu or strides=1,1,2,2; may be repeated",
    )
    return made


def _value(text: str) -> Any:
    """A model option's value as typed: a number, true or false, a list with commas, or a text."""
    if "," in text:
        return [_value(part) for part in text.split(",") if part]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def given(arguments: Any) -> dict[str, Any]:
    """The options of `Recipe` that were given, by name.

    Raises:
        UsageError: a --model-option that is no NAME=VALUE.
    """
    found = {o.name: getattr(arguments, o.name) for o in options() if getattr(arguments, o.name) is not None}
    model_options = {}
    for text in arguments.model_option:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise command_line.UsageError(f"--model-option must be NAME=VALUE, got {text!r}")
        model_options[name] = _value(value)
    if model_options:
        found["model_options"] = model_options
    return found
