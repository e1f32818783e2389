"""Tables, figures and widgets for notebooks: live for a person, the same information plain in an executed notebook.

Owns how things look; each file one subject, all of them under one name. Must not know files or the network.

    python -c "from lib.show import is_interactive; print(is_interactive())"
"""

from lib.show.evaluation import gains, part_shares, pass_at_k, runs, summaries, verdict
from lib.show.export import answers, artifacts, commands, distances, proofs
from lib.show.figure import BLUE, GREEN, GREY, ORANGE, RED, bars, smooth, use_style
from lib.show.groups import browser
from lib.show.inspection import lengths, reward_spread, useful_groups
from lib.show.labels import label_sheet
from lib.show.meter import meter
from lib.show.page import config, is_interactive, messages, rows, table, text
from lib.show.preflight import attacks, gate
from lib.show.roles import roles
from lib.show.training import attempts, curves, live, parts, rollouts
from lib.show.transcript import transcript

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "RED",
    "answers",
    "artifacts",
    "attacks",
    "attempts",
    "bars",
    "browser",
    "commands",
    "config",
    "curves",
    "distances",
    "gains",
    "gate",
    "is_interactive",
    "label_sheet",
    "lengths",
    "live",
    "messages",
    "meter",
    "part_shares",
    "parts",
    "pass_at_k",
    "proofs",
    "reward_spread",
    "roles",
    "rollouts",
    "rows",
    "runs",
    "smooth",
    "summaries",
    "table",
    "text",
    "transcript",
    "use_style",
    "useful_groups",
    "verdict",
]
