"""One style of figure, saved small."""

import io
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LIMIT = 300_000  # bytes of a figure
STYLE = {
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
}
plt.rcParams.update(STYLE)
COLOURS = plt.get_cmap("tab10").colors


def colour_of(place: int) -> tuple[float, float, float]:
    return COLOURS[place % len(COLOURS)]


def panel(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axis


def draw_rows(rates: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Hack and solve of each row of a table: a dot a run, a stroke at their mean."""
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8.5, 1 + 0.3 * len(rates)))
    for place, own in enumerate(rates.values()):
        for axis, which in zip(axes, own):
            axis.plot(
                own[which],
                [place] * len(own[which]),
                "o",
                alpha=0.4,
                color=COLOURS[0],
            )
            axis.plot(mean(own[which]), place, "|", markersize=16, color="black")
            axis.set(xlabel=f"deployed {which}", xlim=(-0.03, 1.0))
    axes[0].set_yticks(range(len(rates)), [*rates])
    axes[0].invert_yaxis()
    save(figure, path)


def save(figure: Figure, path: Path, rect: tuple = (0, 0, 1, 1)) -> None:
    """Write and close a figure, as sharp as LIMIT allows; `rect` is what the axes may fill.

    Axes with labels get a legend, unless the figure has one.
    """
    if not figure.legends:
        for axis in figure.axes:
            if axis.get_legend_handles_labels()[1] and not axis.get_legend():
                axis.legend()
    figure.tight_layout(rect=rect)
    path.parent.mkdir(parents=True, exist_ok=True)
    for dpi in (140, 110, 80, 50):
        figure.savefig(path, dpi=dpi)
        if path.stat().st_size <= LIMIT:
            break
    plt.close(figure)


def svg(figure: Figure) -> str:
    """A figure as an inline <svg> element, and closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
