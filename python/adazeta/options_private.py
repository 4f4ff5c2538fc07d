"""The settings of a differentially private run (docs/private.md)."""

from .option import Option

PRIVATE = [
    Option(
        "dp-epsilon",
        float,
        "differentially private training: as much noise as keeps all steps within this epsilon",
        shown="not private",
    ),
    Option("dp-noise", float, "the noise itself, in units of --dp-clip, in place of --dp-epsilon", shown="not private"),
    Option(
        "dp-clip",
        float,
        "bound on the norm, over the queries of a step, of an example's loss differences; in loss",
        default=0.5,
    ),
    Option("dp-delta", float, "probability with which epsilon may fail, below 1 / examples", 1e-5),
]
