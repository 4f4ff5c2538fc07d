"""Draw runs: loss and accuracy against forward rows, the unit of cost; queries, projected gradients and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adazeta.errors import UserError
from adazeta.files import replacing

if TYPE_CHECKING:
    from adazeta.compare import Record

COLORS = ("#1f4e9c", "#c2571a", "#2a8a57", "#8a3f8f", "#b08a00", "#3a9fbf", "#a33b45", "#6b6b6b")
TRAIN, DEV, BEFORE, AFTER = "#9db4d3", "#1f4e9c", "#8a8a8a", "#c2571a"


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Return the bias-corrected exponential moving average: ``m_k = w m_{k-1} + (1 - w) v_k``, over ``1 - w^k``."""
    mean, norm, out = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def draw_curves(
    lines: Sequence[dict],
    path: str | Path,
    *,
    title: str = "",
    before: dict | None = None,
    after: dict | None = None,
    where: str = "test",
) -> None:
    """Draw ``metrics.jsonl`` to a PNG file, aside then renamed.

    Args:
        lines: metrics as :func:`adazeta.runs.read_metrics` returns them; no training line is fine.
        path: the PNG file.
        title: above both panels.
        before, after: ``{"loss", "accuracy"}`` of ``where`` before and after training, drawn as level lines.
        where: name of the split that ``before`` and ``after`` were measured on.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    train = [line for line in lines if line["kind"] == "train" and "loss" in line]
    dev = [line for line in lines if line["kind"] == "dev"]
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    if train:
        loss_axes.plot(
            [line["rows"] for line in train],
            smooth([line["loss"] for line in train]),
            color=TRAIN,
            label="train, smoothed",
        )
    for axes, name in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        points = [(line["rows"], line[name]) for line in dev if name in line]
        if points:
            axes.plot(*zip(*points), color=DEV, marker="o", markersize=4, label="dev")
        for values, color, word in ((before, BEFORE, "before"), (after, AFTER, "after")):
            if values and name in values:
                text = f"{values[name]:.1%}" if name == "accuracy" else f"{values[name]:.3f}"
                axes.axhline(values[name], color=color, linestyle="--", linewidth=1.2, label=f"{where} {word}: {text}")
        axes.set_xlabel("forward rows (one sequence through the model once)")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    loss_axes.set_ylabel("loss (nats per example)")
    accuracy_axes.set_ylabel("accuracy")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if title:
        figure.suptitle(title, parse_math=False)
    with replacing(path) as target:
        figure.savefig(target, format="png")


@dataclass(frozen=True)
class Panel:
    """One panel of :func:`draw_runs`: a value of the metrics against another."""

    name: str
    against: str
    label: str
    percent: bool = False
    #: Averaged over steps, where a step alone says little.
    smooth: bool = False


AXES = {"rows": "forward rows", "seconds": "seconds of training, without evaluations", "step": "step"}
PANELS = (
    Panel("loss", "rows", "loss (nats per example)", smooth=True),
    Panel("loss", "seconds", "loss (nats per example)", smooth=True),
    Panel("accuracy", "rows", "accuracy", percent=True),
    Panel("accuracy", "seconds", "accuracy", percent=True),
    Panel("queries", "step", "queries per step"),
    Panel("spread", "step", "spread of the projected gradients", smooth=True),
    Panel("snr", "step", "signal to noise of a step", smooth=True),
    Panel("peak_mib", "step", "peak memory, MiB"),
)


def figure_of(records: Sequence[Record]):
    """Return a matplotlib figure of runs: a panel for each of :data:`PANELS` that any run has values for.

    Train lines are thin (smoothed where a step alone says little), evaluations have marks. A run has one colour.

    Raises:
        UserError: no run has anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    panels = [
        p for p in PANELS if any(r.series(p.name, p.against, kind)[0] for r in records for kind in ("train", "dev"))
    ]
    if not panels:
        raise UserError(f"{', '.join(record.name for record in records)}: no step and no evaluation to draw yet")
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.6 * lines + 0.3), dpi=130, layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False).flat
    for axes, panel in zip(grid, panels):
        for index, record in enumerate(records):
            color = COLORS[index % len(COLORS)]
            x, y = record.series(panel.name, panel.against)
            if x:
                axes.plot(x, smooth(y) if panel.smooth else y, color=color, linewidth=1, alpha=0.6)
            x, y = record.series(panel.name, panel.against, "dev")
            if x:
                axes.plot(x, y, color=color, marker="o", markersize=4)
        axes.set(xlabel=AXES[panel.against], ylabel=panel.label)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if panel.name in ("queries", "peak_mib"):
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], color=COLORS[index % len(COLORS)], marker="o", markersize=4, label=record.name)
        for index, record in enumerate(records)
    ]
    legend = {"loc": "outside upper center", "ncols": min(4, len(handles)), "frameon": False, "title_fontsize": 9}
    names = figure.legend(handles=handles, title="thin: training, averaged where it is noisy; marks: dev", **legend)
    for text in names.get_texts():
        text.set_parse_math(False)  # a folder may be called $x
    return figure


def draw_runs(records: Sequence[Record], path: str | Path) -> None:
    """Draw runs, as :func:`figure_of` does, to a PNG file, aside then renamed.

    Raises:
        UserError: nothing to draw, or the file cannot be written.
    """
    figure = figure_of(records)
    with replacing(path) as target:
        figure.savefig(target, format="png")
