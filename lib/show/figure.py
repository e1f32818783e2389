"""What all figures share: colours, style, and how a figure gets into a cell.

Owns how figures look. Must not know what they show.

    python -c "from lib.show.figure import smooth; print(smooth([1, 2, 3]))"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def bars(counts: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> Figure:
    """Shares side by side: one colour a series, one group a key."""
    figure, axes = new_figure(1, 1, 7.2, 2.6)
    draw_bars(axes[0], counts, title, xlabel)
    return done(figure)


def draw_bars(ax: Axes, counts: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> None:
    keys = sorted({key for series in counts.values() for key in series})
    width = 0.8 / max(1, len(counts))
    for i, ((name, series), color) in enumerate(zip(counts.items(), (BLUE, ORANGE, GREEN, GREY), strict=False)):
        ax.bar(
            [x + i * width for x in range(len(keys))], [series.get(k, 0) for k in keys], width, label=name, color=color
        )
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(keys))], keys)
    ax.set(title=title, xlabel=xlabel, ylabel="share")


def use_style() -> None:
    import matplotlib as mpl

    mpl.rcParams.update(_STYLE)  # type: ignore[arg-type]


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    use_style()
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [ax for line in axes for ax in line]


def done(figure: Figure) -> Figure:
    """A Figure outside pyplot has no notebook representation of its own: give it the PNG one."""
    from IPython.core.pylabtools import print_figure

    figure._repr_png_ = lambda: print_figure(figure, "png", dpi=110)  # type: ignore[attr-defined]
    return figure


def whole_steps(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about an eighth of the curve, of what is there."""
    half = min(4, len(values) // 16)
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v == v]
        means.append(sum(near) / len(near) if near else float("nan"))
    return means


def number(value: Any) -> float:
    return float("nan") if value is None else float(value)
