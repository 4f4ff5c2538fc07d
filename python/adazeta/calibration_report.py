"""What a calibration found: as a table, and as a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adazeta.calibration import Calibration, projection_error
from adazeta.files import replacing
from adazeta.report import facts


def measured(found: Calibration) -> list[tuple[str, str]]:
    """Return names and values of what was measured, for a table."""
    return [
        ("projected gradients", f"{found.spread:.3g} root mean square, in nats per unit of z"),
        ("noise of a loss", f"{found.noise:.2g} nats by rounding"),
        ("signal to noise", f"{found.snr:,.1f} of a projected gradient at this eps"),
        ("curvature z'Hz", f"{found.curvature:.3g} mean; third derivative {found.third:.3g} root mean square"),
        ("gradient norm", f"{found.gradient:.3g}{'' if found.resolved else ', not told apart from its error'}"),
        ("cosine of a step", f"{found.cosine:.3f} with the gradient, of {found.directions:,.0f} directions"),
        ("loss expected", f"{found.loss:.3f} before, {found.predicted:.3f} after {found.steps:,} steps"),
    ]


def describe(found: Calibration) -> str:
    """Return the table of a calibration."""
    lines = [
        ("eps", f"{found.eps:g}"),
        ("lr", f"{found.lr:g}"),
        *measured(found),
        ("measured on", f"{found.losses:,} losses; {found.numbers:,} trained numbers"),
    ]
    return facts(lines)


def draw(found: Calibration, path: str | Path) -> None:
    """Draw what the proposals rest on to a PNG file, aside then renamed.

    Three panels: the error of a projected gradient against eps, the rise of the loss at random displacements, and the
    loss expected against the learning rate.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    error_axes, rise_axes, rate_axes = figure.subplots(1, 3)
    eps = np.array(found.ladder["eps"])
    known = {name: np.array([np.nan if v is None else v for v in found.ladder[name]]) for name in found.ladder}
    smooth = np.geomspace(eps[-1], eps[0], 200)

    error_axes.loglog(eps, known["projected"], "o-", color="#1f4e9c", markersize=4, label="projected gradient")
    error_axes.loglog(eps[:-1], known["error"], "o", color="#c2571a", markersize=4, label="its error, measured")
    fitted = projection_error(smooth, found.noise, found.third)
    error_axes.loglog(smooth, np.maximum(fitted, 1e-12), color="#c2571a", linewidth=1, label="noise and bias, fitted")
    error_axes.axvline(found.eps, color="#8a8a8a", linestyle="--", linewidth=1.2, label=f"eps {found.eps:g}")
    error_axes.set_xlabel("eps")
    error_axes.set_ylabel("root mean square, nats per unit of z")

    up = known["rise"] > 0
    rise_axes.loglog(eps[up], known["rise"][up], "o-", color="#1f4e9c", markersize=4, label="rise of the loss")
    rise_axes.set_xlabel("random displacement per number")
    rise_axes.set_ylabel("nats")

    rate_axes.semilogx(found.rates["lr"], np.minimum(found.rates["loss"], 2 * found.loss), color="#1f4e9c")
    rate_axes.axhline(found.loss, color="#8a8a8a", linewidth=1, label="loss before")
    rate_axes.axvline(found.lr, color="#c2571a", linestyle="--", linewidth=1.2, label=f"lr {found.lr:g}")
    rate_axes.set_xlabel("learning rate")
    rate_axes.set_ylabel(f"loss expected after {found.steps:,} steps")
    for axes in (error_axes, rise_axes, rate_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    with replacing(path) as target:
        figure.savefig(target, format="png")
