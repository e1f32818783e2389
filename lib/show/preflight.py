"""The gate of notebook 2: what cheats earned, every check with its knob, and one banner: go or no-go.

Owns how they look. Must not know the thresholds.

    python -c "from lib.show import gate; gate([])"
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from lib.preflight import Attacked, AttackTable, Check, verdict
from lib.show.figure import GREEN, ORANGE, RED
from lib.show.page import details, html_table, put, short

_COLORS = {"go": GREEN, "caution": ORANGE, "no-go": RED}
"""By level, the best first."""
_SHOWN = 90
"""Characters of a cheat that are shown."""


def gate(checks: Sequence[Check]) -> None:
    """The verdict as a banner, and every check: what was found, what it means, what to turn."""
    worst = max((check.level for check in checks), key=list(_COLORS).index, default="go")
    banner = (
        f'<div style="background:{_COLORS[worst]};color:white;padding:8px 12px;font-size:1.15em;font-weight:600">'
        f"{html.escape(verdict(checks))}</div>"
    )
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in ("", "check", "found", "meaning", "turn"))
    put(f"{banner}<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(_line, checks))}</tbody></table>")


def attacks(table: AttackTable) -> None:
    """What the cheats earned: those that work first and in full, then every family."""
    working = table.working
    color = RED if working else GREEN
    said = f"<b>{len(working)} of {len(table.attacked)} cheats work</b> on {len(table.rows)} rows"
    put(f'<p style="color:{color};font-size:1.1em">{said}</p><p>{_yardstick(table)}</p>')
    if working:
        put(
            html_table([{"cheat": one.name, "why it works": one.works, "answer": visible(one.text)} for one in working])
        )
    families = groupby(table.attacked, key=lambda one: one.family)
    put("".join(_family(family, list(some)) for family, some in families))


def visible(text: str) -> str:
    """The beginning of a text, line ends and invisible characters as they are written in Python."""
    return short("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), _SHOWN) or "(nothing)"


def _line(check: Check) -> str:
    color, knob = _COLORS[check.level], "" if check.level == "go" else check.knob
    cells = "".join(
        f'<td style="text-align:left;vertical-align:top">{html.escape(text)}</td>'
        for text in (check.check, check.shown, check.meaning, knob)
    )
    return f'<tr><td style="color:{color};font-weight:600;white-space:nowrap">{check.level}</td>{cells}</tr>'


def _yardstick(table: AttackTable) -> str:
    """What a cheat is measured against, in words."""
    parts = [
        "" if table.base is None else f"the base policy's median is {table.base:.3f}",
        "" if table.wrong is None else f"a wrong answer earns {table.wrong:.3f}",
    ]
    gold = (
        f" A gold answer earns {fmean(table.gold.values()):.3f}." if table.gold else " These rows have no gold answer."
    )
    said = " and ".join(part for part in parts if part) or "nothing was scored to measure them against"
    return f"None may earn more than {table.bar:.3f}: {said}.{gold}"


def _family(name: str, some: Sequence[Attacked]) -> str:
    best = max((one.mean for one in some if one.mean is not None), default=None)
    working = sum(bool(one.works) for one in some)
    summary = f"{name}: {len(some)} cheats, best {'left out' if best is None else f'{best:.3f}'}, {working} work"
    return details(summary, html_table([_row(one) for one in some]))


def _row(one: Attacked) -> dict[str, str]:
    mean = "" if one.mean is None else f"{one.mean:.3f}"
    return {
        "cheat": one.name,
        "answer": visible(one.text),
        "mean reward": mean,
        "left out": one.left_out,
        "works": one.works,
    }
