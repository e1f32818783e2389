"""Tables, figures and widgets for notebooks: live for a person, the same information plain in an executed notebook.

Owns how things look. Must not know files or the network.

    python -c "from lib.show import is_interactive; print(is_interactive())"
"""

from __future__ import annotations

import html
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.config import Config
from lib.cost import Bill
from lib.evaluate import Comparison, flat
from lib.paired import Gain, Summary
from lib.task import Message, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, RED = "#2f6db5", "#e07b39", "#3a9a6b", "#8a8f98", "#c44536"
_STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
_FEW = 12
"""A part with at most this many values is drawn as shares."""

_FLATTERED = (
    "It is the best of {} runs, chosen on these same rows, which flatters it: confirm it on fresh rows "
    "(evaluation.prompts)."
)

_LIVE_SHARE = 0.04
"""Share of the time that drawing live may take: training needs the rest."""


def is_interactive() -> bool:
    """Whether a person sits before this kernel: Jupyter's server names the notebook it serves, papermill does not."""
    return "JPY_SESSION_NAME" in os.environ


def config(values: Config) -> None:
    """The resolved config: what differs from the defaults as a table, everything else folded away."""
    resolved = flat(values.as_json())
    defaults = flat(Config.model_validate({"task": {"name": values.task.name}}).as_json())
    changed = {key: value for key, value in resolved.items() if defaults.get(key, ...) != value}
    rest = {key: value for key, value in resolved.items() if key not in changed}
    _html(
        _html_table(
            [{"key": key, "value": _short(value)} for key, value in {"task.name": values.task.name, **changed}.items()]
        )
        + _details(
            f"{len(rest)} more at their defaults",
            _html_table([{"key": k, "value": _short(v)} for k, v in rest.items()]),
        )
    )


def table(records: Iterable[Mapping[str, Any]], caption: str = "") -> None:
    """Records as a table; long texts are cut, floats have three decimals."""
    _html((f"<p><b>{html.escape(caption)}</b></p>" if caption else "") + _html_table(list(records)))


def messages(conversation: Sequence[Message], title: str = "") -> None:
    """A conversation, one block a message."""
    blocks = "".join(
        f'<div style="margin:2px 0"><span style="color:{BLUE};font-weight:600">{html.escape(str(m["role"]))}</span> '
        f'<span style="white-space:pre-wrap;font-family:monospace">{html.escape(_content(m))}</span></div>'
        for m in conversation
    )
    _html(f"<p><b>{html.escape(title)}</b></p>{blocks}" if title else blocks)


def text(value: str, title: str = "") -> None:
    """A text exactly as it is, line breaks and all."""
    heading = f"<p><b>{html.escape(title)}</b></p>" if title else ""
    _html(f'{heading}<pre style="background:#f5f6f8;padding:6px;white-space:pre-wrap">{html.escape(value)}</pre>')


def rows(some: Iterable[Row], caption: str = "") -> None:
    """Rows by their id, category, prompt and gold answer."""
    table(
        (
            {
                "id": row["id"],
                "category": row.get("category", ""),
                "prompt": _content(row["prompt"][-1]),
                "gold": _content(row["gold"][-1]) if row.get("gold") else "",
            }
            for row in some
        ),
        caption,
    )


def lengths(tokens: Mapping[str, Sequence[int]], limit: int) -> Figure:
    """Token lengths of the prompts of every split, against the limit."""
    figure, axes = _figure(1, 1, 7.2, 2.4)
    ax = axes[0]
    for (name, values), color in zip(tokens.items(), (BLUE, ORANGE), strict=False):
        ax.hist(
            values, bins=min(40, max(5, len(set(values)))), alpha=0.65, color=color, label=f"{name} (n={len(values)})"
        )
    longest = max((max(values) for values in tokens.values() if values), default=0)
    if limit <= 2 * longest:
        ax.axvline(limit, color=RED, linestyle="--", label=f"prompt_limit {limit}")
    else:
        ax.plot([], [], " ", label=f"prompt_limit {limit}: far to the right")
    ax.set(title="Prompt length", xlabel="tokens", ylabel="rows")
    ax.legend()
    return _done(figure)


def reward_spread(groups: Sequence[Sequence[float | None]]) -> Figure:
    """Rewards of the base policy's answers: all of them, and how far they spread within a group."""
    figure, (left, right) = _figure(1, 2, 9.5, 2.8)
    scored = [[r for r in group if r is not None] for group in groups]
    left.hist([r for group in scored for r in group], bins=30, color=BLUE, alpha=0.8)
    left.set(title="Rewards of the base policy", xlabel="reward", ylabel="answers")
    ordered = sorted((g for g in scored if g), key=lambda g: sum(g) / len(g))
    for position, group in enumerate(ordered):
        right.plot([position, position], [min(group), max(group)], color=BLUE, alpha=0.35, linewidth=2)
        right.plot(position, sum(group) / len(group), ".", color=ORANGE, markersize=4)
    right.set(title="Within groups: range and mean", xlabel="group, by mean reward", ylabel="reward")
    return _done(figure)


def curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Training curves: reward, signal, loss and gradient, entropy and KL, length, valid answers."""
    figure, axes = _figure(2, 3, 11, 5)
    steps = [m["step"] for m in metrics]

    def draw(ax: Axes, title: str, *series: tuple[str, str, str]) -> None:
        for key, label, color in series:
            values = [_number(m.get(key)) for m in metrics]
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
        _whole_steps(ax)
    return _done(figure)


def live(bill: Callable[[], Bill] | None = None) -> Callable[[list[dict[str, Any]], bool], None]:
    """A watcher that redraws the curves in place as metrics arrive, in a small share of the time; the last always.

    With `bill` the figure also says what the run has cost so far.
    """
    from IPython.display import DisplayHandle, display

    handle: DisplayHandle | None = None
    ready = 0.0

    def watch(metrics: list[dict[str, Any]], final: bool) -> None:
        nonlocal handle, ready
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
        ready = time.monotonic() + (time.monotonic() - started) / _LIVE_SHARE

    return watch


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


def summaries(policies: Sequence[Summary]) -> None:
    """One line a policy: mean reward with its interval, valid share, parts."""
    table(
        {
            "policy": s.policy,
            "reward": f"{s.reward:.3f} [{s.low:.3f}, {s.high:.3f}]",
            "n": s.n,
            "valid": f"{s.valid:.1%}",
            "reward, invalid = 0": f"{s.reward_with_invalid:.3f}",
            "unscored": s.unscored,
            **{name: value for name, value in s.parts.items() if name != "valid"},
        }
        for s in policies
    )


def gains(by_name: Mapping[str, Gain], title: str, unit: str = "reward") -> Figure:
    """Paired gains with 95 % intervals; grey where the interval includes zero."""
    figure, axes = _figure(1, 1, 7.6, 0.9 + 0.34 * max(2, len(by_name)))
    ax = axes[0]
    for y, gain in enumerate(reversed(list(by_name.values()))):
        color = (GREEN if gain.mean > 0 else RED) if gain.clear else GREY
        ax.plot([gain.low, gain.high], [y, y], color=color, linewidth=2.5, solid_capstyle="round")
        ax.plot(gain.mean, y, "o", color=color)
        label = f"{_interval(gain)}  n={gain.n}"
        ax.annotate(label, (gain.high, y), xytext=(8, -3), textcoords="offset points", fontsize=8)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(by_name)), list(reversed(list(by_name))))
    ax.set(title=title, xlabel=f"gain in {unit} (paired, 95 % interval)", ylim=(-0.6, len(by_name) - 0.4))
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + 0.55 * (high - low))
    return _done(figure)


def runs(comparison: Comparison) -> Figure | None:
    """Several runs at a glance, the best first: where their configs differ, reward and gain; a dot with interval each.

    Says so in a word, and draws nothing, where the comparison is of one run.
    """
    if not comparison.settings:
        text("One run: nothing to rank. evaluation.runs names several.")
        return None
    by_name = {s.policy: s for s in comparison.summaries}
    table(_run(name, comparison, by_name[f"{name} sampled"]) for name in comparison.settings)
    _html(f"<p>{_over_runner_up(comparison)}</p>")
    return _ranking([by_name[f"{name} sampled"] for name in comparison.settings], by_name["base sampled"])


def bars(counts: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> Figure:
    """Shares side by side: one colour a series, one group a key."""
    figure, axes = _figure(1, 1, 7.2, 2.6)
    _draw_bars(axes[0], counts, title, xlabel)
    return _done(figure)


def parts(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The mean of every part of the score over training."""
    names = sorted({key for m in metrics for key in m if key.startswith("parts/")})
    if not names:
        return None
    figure, axes = _figure(-(-len(names) // 3), 3, 11, 2.3 * -(-len(names) // 3))
    for ax, name in zip(axes, names, strict=False):
        values = [_number(m.get(name)) for m in metrics]
        ax.plot([m["step"] for m in metrics], values, color=BLUE, alpha=0.3, linewidth=1)
        ax.plot([m["step"] for m in metrics], smooth(values), color=BLUE, linewidth=2)
        ax.set_title(name.removeprefix("parts/"))
        _whole_steps(ax)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return _done(figure)


def part_shares(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """For every part with few values (the chosen action, say): how often each value occurs, policy by policy."""
    names = sorted({name for some in records.values() for record in some for name in record["parts"]})
    values = {name: {label: _values(some, name) for label, some in records.items()} for name in names}
    few = [name for name in names if 2 < len({v for some in values[name].values() for v in some}) <= _FEW]
    if not few:
        return None
    figure, axes = _figure(1, len(few), 6 * len(few), 2.8)
    for ax, name in zip(axes, few, strict=True):
        shares = {
            label: {f"{v:g}": some.count(v) / len(some) for v in set(some)}
            for label, some in values[name].items()
            if some
        }
        _draw_bars(ax, shares, name, "value")
    axes[-1].legend()
    return _done(figure)


def verdict(comparison: Comparison) -> None:
    """The result in sentences: the gain, what this many rows can show, and how much of it is sharpening."""
    sampled = comparison.gains[f"{comparison.final} sampled"]
    lines = [
        f"<b>{comparison.final} against base, sampled answers: {_interval(sampled)}</b> on {sampled.n} rows "
        f"({sampled.left_out} left out because a side was masked or unscored).",
        "The interval excludes zero." if sampled.clear else "The interval includes zero: no difference is shown.",
        *([_FLATTERED.format(len(comparison.settings))] if len(comparison.settings) > 1 else []),
        f"With this many rows, a true gain below {sampled.detectable:.3f} would usually be missed.",
    ]
    over = comparison.over_greedy_base
    greedy = next((s for s in comparison.summaries if s.policy == "base greedy"), None)
    base = next(s for s in comparison.summaries if s.policy == "base sampled")
    if over and greedy:
        lines.append(
            f"Sharpening alone (the base answering greedily) would give {greedy.reward - base.reward:+.3f}; "
            f"sampled answers after training against the base's greedy ones: {_interval(over)}."
        )
    _html("".join(f"<p>{line}</p>" for line in lines))


def _cost(bill: Bill) -> str:
    """A bill in a line: dollars and hours, role by role."""
    roles = ", ".join(f"{role} ${line.usd:.4f}" for role, line in bill.lines.items() if line.usd)
    return f"so far ${bill.usd:.4f} in {bill.hours:.2f} h" + (f" ({roles})" if roles else "")


def _run(name: str, comparison: Comparison, summary: Summary) -> dict[str, Any]:
    return {
        "run": name,
        **comparison.settings[name],
        "reward": f"{summary.reward:.3f} [{summary.low:.3f}, {summary.high:.3f}]",
        "gain over base": _interval(comparison.gains[f"{name} sampled"]),
        "valid": f"{summary.valid:.1%}",
        "reward, invalid = 0": f"{summary.reward_with_invalid:.3f}",
    }


def _over_runner_up(comparison: Comparison) -> str:
    over, names = comparison.over_runner_up, list(comparison.settings)
    if over is None:
        return f"Only {names[0]} was named: there is no runner-up."
    shown = "the interval excludes zero" if over.clear else "no difference is shown"
    return (
        f"The best, {names[0]}, against the runner-up, {names[1]}: {_interval(over)} on the {over.n} rows "
        f"that both scored ({over.left_out} left out): {shown}. "
        f"{_FLATTERED.format(len(names))}"
    )


def _ranking(ranked: Sequence[Summary], base: Summary) -> Figure:
    """Mean reward with its 95 % interval by run, the best on top, and the base's as a band."""
    figure, axes = _figure(1, 1, 7.6, 1.1 + 0.34 * max(2, len(ranked)))
    ax = axes[0]
    ax.axvspan(base.low, base.high, color=GREY, alpha=0.2, linewidth=0)
    ax.axvline(base.reward, color=GREY, linestyle="--", linewidth=1, label=f"base {base.reward:.3f}")
    for y, summary in enumerate(reversed(ranked)):
        color = BLUE if summary is ranked[0] else GREY
        ax.plot([summary.low, summary.high], [y, y], color=color, linewidth=2.5, solid_capstyle="round")
        ax.plot(summary.reward, y, "o", color=color)
        ax.annotate(f"{summary.reward:.3f}", (summary.high, y), xytext=(8, -3), textcoords="offset points", fontsize=8)
    ax.set_yticks(range(len(ranked)), [s.policy.removesuffix(" sampled") for s in reversed(ranked)])
    ax.set(title="Runs by held-out reward", xlabel="mean reward (95 % interval)", ylim=(-0.6, len(ranked) - 0.4))
    ax.legend()
    ax.margins(x=0.15)
    return _done(figure)


def _interval(gain: Gain) -> str:
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def _values(records: Sequence[Mapping[str, Any]], part: str) -> list[float]:
    return [record["parts"][part] for record in records if record["parts"].get(part) is not None]


def _draw_bars(ax: Axes, counts: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> None:
    keys = sorted({key for series in counts.values() for key in series})
    width = 0.8 / max(1, len(counts))
    for i, ((name, series), color) in enumerate(zip(counts.items(), (BLUE, ORANGE, GREEN, GREY), strict=False)):
        ax.bar(
            [x + i * width for x in range(len(keys))], [series.get(k, 0) for k in keys], width, label=name, color=color
        )
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(keys))], keys)
    ax.set(title=title, xlabel=xlabel, ylabel="share")


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


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    use_style()
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [ax for line in axes for ax in line]


def _whole_steps(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def use_style() -> None:
    import matplotlib as mpl

    mpl.rcParams.update(_STYLE)  # type: ignore[arg-type]


def _done(figure: Figure) -> Figure:
    """A Figure outside pyplot has no notebook representation of its own: give it the PNG one."""
    from IPython.core.pylabtools import print_figure

    figure._repr_png_ = lambda: print_figure(figure, "png", dpi=110)  # type: ignore[attr-defined]
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about an eighth of the curve, of what is there."""
    half = min(4, len(values) // 16)
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v == v]
        means.append(sum(near) / len(near) if near else float("nan"))
    return means


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _content(message: Message) -> str:
    content = message.get("content")
    return (
        content
        if isinstance(content, str)
        else json.dumps(content if content is not None else message, ensure_ascii=False)
    )


def _short(value: Any, limit: int = 220) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= limit else shown[:limit] + " …"


def _html_table(records: list[Mapping[str, Any]]) -> str:
    if not records:
        return "<p>(nothing)</p>"
    columns = list(dict.fromkeys(column for record in records for column in record))
    head = "".join(f'<th style="text-align:left">{html.escape(column)}</th>' for column in columns)
    cell = '<td style="text-align:left;white-space:pre-wrap;vertical-align:top">'
    body = "".join(
        "<tr>" + "".join(f"{cell}{html.escape(_short(record.get(column, '')))}</td>" for column in columns) + "</tr>"
        for record in records
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{inside}</details>"


def _html(markup: str) -> None:
    from IPython.display import HTML, display

    display(HTML(markup))
