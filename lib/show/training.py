"""Notebook 3: curves, live as they grow, parts of the score, attempts and sampled answers.

Owns these figures and tables. Must not know where the records come from.

    python -c "from lib.show import curves; curves([{'step': 1, 'reward': 0.5}]).savefig('/tmp/curves.png')"
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.cost import Bill
from lib.show.figure import BLUE, GREEN, GREY, ORANGE, RED, done, new_figure, number, smooth, whole_steps
from lib.show.page import is_interactive, table
from lib.show.roles import LIVE_SECONDS, roles_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LIVE_SHARE = 0.04
"""Share of the time that drawing live may take: training needs the rest."""


def curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Training curves: reward, signal, loss and gradient, entropy and KL, length, valid answers."""
    figure, axes = new_figure(2, 3, 11, 5)
    steps = [m["step"] for m in metrics]

    def draw(ax: Axes, title: str, *series: tuple[str, str, str]) -> None:
        for key, label, color in series:
            values = [number(m.get(key)) for m in metrics]
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
            ax.plot(steps, smooth(values), color=color, linewidth=2, label=label)
        ax.set_title(title)
        if len(series) > 1:
            ax.legend()

    panels = list(axes)
    draw(panels[0], "Mean reward", ("reward", "reward", BLUE))
    draw(panels[1], "Signal", ("groups/useful", "groups with signal", GREEN), ("reward_std", "reward std", ORANGE))
    draw(panels[2], "Loss and gradient", ("loss", "loss", BLUE), ("grad_norm", "gradient norm", GREY))
    draw(panels[3], "Entropy (nats a token)", ("entropy", "entropy", ORANGE))
    if any("kl" in m for m in metrics):
        draw(panels[3], "Entropy and KL (nats a token)", ("kl", "KL to the base", RED))
    draw(panels[4], "Answer length (tokens)", ("completions/mean_length", "mean", BLUE))
    masked, unscored = ("rollouts/masked", "masked by the task", ORANGE), ("rollouts/unscored", "unscored", RED)
    draw(panels[5], "Valid, and left out", ("parts/valid", "valid", GREEN), masked, unscored)
    panels[5].set_ylim(-0.02, 1.02)
    for ax in panels:
        ax.set_xlabel("step")
        whole_steps(ax)
    return done(figure)


def live(
    bill: Callable[[], Bill] | None = None, events: Callable[[], Sequence[Mapping[str, Any]]] | None = None
) -> Callable[[list[dict[str, Any]], bool], None]:
    """A watcher that redraws the curves in place as metrics arrive, in a small share of the time; the last always.

    With `bill` the figure also says what the run has cost so far; with `events`, where several roles train, a second
    one shows who is busy.
    """
    from IPython.display import DisplayHandle, display

    handle: DisplayHandle | None = None
    handle_of_roles: DisplayHandle | None = None
    ready = 0.0

    def watch(metrics: list[dict[str, Any]], final: bool) -> None:
        nonlocal handle, handle_of_roles, ready
        if not metrics or not (final or time.monotonic() > ready):
            return
        started = time.monotonic()
        figure = curves(metrics)
        if bill:
            figure.suptitle(_cost(bill()), x=0.01, y=1.0, ha="left", va="bottom", fontsize=9, color=GREY)
        if handle is None:
            handle = display(figure, display_id=True)
        else:
            handle.update(figure)
        happened = events() if events else ()
        if happened:
            busy = roles_figure(happened, metrics, LIVE_SECONDS)
            if handle_of_roles is None:
                handle_of_roles = display(busy, display_id=True)
            else:
                handle_of_roles.update(busy)
        ready = time.monotonic() + (time.monotonic() - started) / _LIVE_SHARE

    return watch


def parts(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The mean of every part of the score over training."""
    names = sorted({key for m in metrics for key in m if key.startswith("parts/")})
    if not names:
        return None
    figure, axes = new_figure(-(-len(names) // 3), 3, 11, 2.3 * -(-len(names) // 3))
    for ax, name in zip(axes, names, strict=False):
        values = [number(m.get(name)) for m in metrics]
        ax.plot([m["step"] for m in metrics], values, color=BLUE, alpha=0.3, linewidth=1)
        ax.plot([m["step"] for m in metrics], smooth(values), color=BLUE, linewidth=2)
        ax.set_title(name.removeprefix("parts/"))
        whole_steps(ax)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return done(figure)


def attempts(started: Sequence[Mapping[str, Any]]) -> None:
    """Every attempt of a stage that took more than one: when it began, and where."""
    if len(started) > 1:
        table(
            (
                {
                    "attempt": number,
                    "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["started"])),
                    "machine": attempt["machine"],
                }
                for number, attempt in enumerate(started, 1)
            ),
            f"This stage took {len(started)} attempts",
        )


def rollouts(records: Sequence[Mapping[str, Any]], per_step: int = 4) -> None:
    """Sampled answers: some of every tenth of training; with a slider over all steps for a person."""
    steps = sorted({record["step"] for record in records})
    chosen = [steps[round(i * (len(steps) - 1) / 9)] for i in range(10)] if len(steps) > 10 else steps
    if is_interactive() and steps:
        _slider(records, steps)
    table([_rollout(r) for step in dict.fromkeys(chosen) for r in [r for r in records if r["step"] == step][:per_step]])


def _cost(bill: Bill) -> str:
    """A bill in a line: dollars and hours, role by role."""
    roles = ", ".join(f"{role} ${line.usd:.4f}" for role, line in bill.lines.items() if line.usd)
    return f"so far ${bill.usd:.4f} in {bill.hours:.2f} h" + (f" ({roles})" if roles else "")


def _slider(records: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> None:
    import ipywidgets
    from IPython.display import display

    def show(step: int) -> None:
        table([_rollout(r) for r in records if r["step"] == step][:16])

    display(ipywidgets.interactive(show, step=ipywidgets.SelectionSlider(options=steps, description="step")))


def _rollout(record: Mapping[str, Any]) -> dict[str, Any]:
    reward = "masked" if record["masked"] else "unscored" if record["reward"] is None else record["reward"]
    return {
        "step": record["step"],
        "row": record["row"],
        "prompt": record["prompt"],
        "answer": record["completion"],
        "reward": reward,
    }
