"""Draw a run's curves: loss and accuracy against forward rows, the unit of cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adazeta.files import replacing

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
        lines: metrics as :func:`adazeta.progress.read_metrics` returns them; no training line is fine.
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
        figure.suptitle(title)
    with replacing(path) as target:
        figure.savefig(target, format="png")
