"""Draw what a step costs against queries, tokens and size of the model, from the records of `bench_step.py`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import multimode

SIDES = {"published_ms": ("published", ":", "x"), "ours_ms": ("ours", "-", "o"), "floor_ms": ("floor", "--", ".")}


def draw_step_cost(records: Sequence[Mapping], path: str | Path) -> None:
    """Write three panels to a PNG file; in each all but one quantity is fixed, at the value most records share.

    Args:
        records: `extra_info` of `bench_step`; those with the number of threads that most of them have are drawn.
        path: the PNG file; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    threads = multimode(record["threads"] for record in records)[0]
    records = [record for record in records if record["threads"] == threads]
    figure = Figure(figsize=(13, 4.4), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    def kind(record):
        return f"{record['model']} {record['dtype']}"

    def shape(record):
        return f"{record['examples']} x {record['tokens']} tokens"

    def queries(record):
        return f"Q = {record['queries']}"

    _panel(left, records, "queries", lambda r: r["queries"], shape, kind)
    _panel(middle, records, "tokens in the batch", lambda r: r["examples"] * r["tokens"], queries, kind)
    _panel(
        right,
        records,
        "parameters of the model, millions",
        lambda r: r["parameters"] / 1e6,
        lambda r: f"{shape(r)}, {queries(r)}",
        lambda r: r["dtype"],
    )
    left.set_ylabel("milliseconds per step")
    figure.suptitle(f"Published-style step, ours, and 2 Q frozen forwards ({records[0]['device']}, threads: {threads})")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _panel(axes, records, label: str, x: Callable, fixed: Callable, series: Callable) -> None:
    """Draw the records of the value of `fixed` at which `x` takes most values, one colour for each of `series`."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    values: dict[str, set] = {}
    for record in records:
        values.setdefault(fixed(record), set()).add((series(record), x(record)))
    chosen = max(values, key=lambda value: len(values[value]))
    shown = sorted((record for record in records if fixed(record) == chosen), key=x)
    names = sorted({series(record) for record in shown})
    lines = {name: [record for record in shown if series(record) == name] for name in names}
    if any(len(points) > 2 for points in lines.values()):  # one or two points say little of a trend
        lines = {name: points for name, points in lines.items() if len(points) > 2}
        shown = [record for points in lines.values() for record in points]
    for index, (name, points) in enumerate(lines.items()):
        for key, (side, style, marker) in SIDES.items():
            axes.plot(
                [x(record) for record in points],
                [record[key] for record in points],
                style,
                marker=marker,
                markersize=5,
                color=f"C{index}",
                label=f"{name}, {side}",
            )
    axes.set(xlabel=label, xscale="log", yscale="log", title=chosen)
    ticks = sorted({x(record) for record in shown})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
