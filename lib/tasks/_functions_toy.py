"""Short requests for the starter policy ("weather in Paris today") with one or two tools and mediocre answers.

Owns the made rows: every wording is there once, so that a held-out one was never seen (its city was: the toy learns
words, not how to copy them). Must not know rewards or how calls are written.

    python -c "from lib.tasks._functions_toy import made; print(made(8, 0)[0])"
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from lib.data import Record
from lib.task import TaskError

RIGHT = 0.4
"""The share of demonstrations that are right; the others call the wrong function, or with a wrong value, or not."""

_CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito")
_PEOPLE = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gina", "Hugo")
_ROOMS = ("kitchen", "hall", "bath", "attic", "garage", "office")
_OPENINGS = ("", "please ", "hey, ", "well, ", "you there: ", "next: ")
_ENDINGS = ("", " please", " now", ", thanks", ", quickly", ", if you can")


class _Tool(NamedTuple):
    description: str
    values: dict[str, Sequence[Any]]
    """Every value of each parameter; its type is that of the values."""
    requests: tuple[str, ...]


_TOOLS = {
    "weather": _Tool(
        "Weather forecast",
        {"city": _CITIES, "day": ("today", "tomorrow")},
        ("weather in {city} {day}", "will it rain in {city} {day}", "{day} in {city}: sun or rain"),
    ),
    "local_time": _Tool(
        "Time in a city", {"city": _CITIES}, ("time in {city}", "what is the hour in {city}", "clock of {city}")
    ),
    "call": _Tool(
        "Call a person", {"person": _PEOPLE}, ("call {person}", "ring {person} up", "I want to talk to {person}")
    ),
    "set_light": _Tool(
        "Switch a light",
        {"room": _ROOMS, "on": (True, False)},
        ("light {on} in the {room}", "{room} light {on}", "turn the {room} {on}"),
    ),
    "timer": _Tool(
        "Start a timer",
        {"minutes": (5, 10, 15, 20, 30, 60)},
        ("timer for {minutes} minutes", "wait {minutes} minutes", "wake me in {minutes} minutes"),
    ),
}
_TYPES = {str: "string", int: "integer", bool: "boolean"}


def made(count: int, seed: int) -> list[Record]:
    """`count` records {id, question, function, ground_truth, category, demonstration}, the same ones for a seed.

    Raises TaskError for more than there are different requests.
    """
    random = Random(seed)
    known = [(name, text, values) for name in _TOOLS for text, values in _requests(name)]
    if count > len(known):
        raise TaskError(f"task.generate_rows {count}: there are {len(known)} different requests. Give fewer.")
    return [_record(number, *one, random) for number, one in enumerate(random.sample(known, count))]


def _requests(name: str) -> list[tuple[str, dict[str, Any]]]:
    tool = _TOOLS[name]
    choices = [dict(zip(tool.values, values, strict=True)) for values in itertools.product(*tool.values.values())]
    wordings = [f"{opening}{text}{ending}" for opening in _OPENINGS for text in tool.requests for ending in _ENDINGS]
    return [(text.format(**_said(values)), values) for text in wordings for values in choices]


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {name: ("on" if value else "off") if isinstance(value, bool) else value for name, value in values.items()}


def _record(number: int, name: str, text: str, values: dict[str, Any], random: Random) -> Record:
    other = random.choice([one for one in _TOOLS if one != name])
    shown = [name] if random.random() < 0.3 else random.sample([name, other], 2)
    return {
        "id": f"made-{number}",
        "question": text,
        "function": [_described(one) for one in shown],
        "ground_truth": [{name: {parameter: [value] for parameter, value in values.items()}}],
        "category": "simple" if len(shown) == 1 else "multiple",
        "demonstration": _demonstration(name, values, shown, random),
    }


def _described(name: str) -> dict[str, Any]:
    tool = _TOOLS[name]
    properties = {parameter: {"type": _TYPES[type(values[0])]} for parameter, values in tool.values.items()}
    parameters = {"type": "dict", "properties": properties, "required": list(properties)}
    return {"name": name, "description": tool.description, "parameters": parameters}


def _demonstration(name: str, values: dict[str, Any], shown: Sequence[str], random: Random) -> Any:
    """Right, or with one value of another request, or with the other function, or an answer in words."""
    chance = random.random()
    if chance < RIGHT:
        return [{"name": name, "arguments": values}]
    if chance < 0.9:
        wrong = name if len(shown) == 1 or random.random() < 0.6 else next(one for one in shown if one != name)
        kept = {parameter: value for parameter, value in values.items() if parameter in _TOOLS[wrong].values}
        drawn = {parameter: random.choice(known) for parameter, known in _TOOLS[wrong].values.items()}
        arguments = {**drawn, **kept}
        if wrong == name:
            parameter = random.choice(list(values))
            arguments[parameter] = drawn[parameter]
        return [{"name": wrong, "arguments": arguments}]
    return "Sure, it is done."
