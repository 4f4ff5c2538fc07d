"""Parameters at one probe after another, written in place: the way of MeZO, without any memory of its own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from adazeta_kernels import perturb_

from .estimator import probe_signs
from .interrupts import uninterrupted


class InPlace:
    """Parameters that move from probe to probe in place, inside a ``with`` statement, and back at its end.

    The move to the first probe, from a probe to the next (the last one undone and the next one applied at once; from
    one sign to the other twice the scale of one seed), and back to theta is one pass over the parameters each: P + 1
    for P probes. The way back is also taken when the statement is left by an exception; Ctrl-C waits for the end of a
    pass, for only then is it known where the parameters are.

    Numerics:
        Every pass rounds once, so theta comes back to rounding only and drifts: ``docs/guide.md`` has the numbers.
        ``adazeta.streamed.Streamed`` never writes theta.

    Args:
        params: contiguous tensors on one device; element i of a direction belongs to element ``i - offset`` of their
            concatenation.
        offset: index of the first element in a direction.
        distribution: ``"gaussian"`` or ``"rademacher"``.

    Source: MeZO (arXiv 2305.17333), algorithm 1.
    """

    def __init__(self, params: Sequence[torch.Tensor], *, offset: int = 0, distribution: str = "gaussian"):
        self._params, self._offset, self._distribution = list(params), offset, distribution
        self._seed, self._scale = 0, 0.0  # where the parameters are: theta + scale z(seed)

    def __enter__(self) -> "InPlace":
        return self

    def __exit__(self, *raised) -> None:
        self.move_to(self._seed, 0.0)

    def move_to(self, seed: int, scale: float) -> None:
        """Bring the parameters to ``theta + scale * z(seed)``, in one pass, from wherever they are."""
        if seed == self._seed:
            terms = [(seed, scale - self._scale)]
        else:
            terms = [(self._seed, -self._scale), (seed, scale)]
        terms = [term for term in terms if term[1] != 0.0]
        with uninterrupted():
            if terms:
                seeds, scales = zip(*terms)
                perturb_(self._params, seeds, scales, offset=self._offset, distribution=self._distribution)
            self._seed, self._scale = seed, scale


@dataclass(frozen=True)
class Drift:
    """What the estimates of a run did to the parameters that it perturbed in place: a replay does it again.

    The bits are those of training where every step had one estimate; in float32, where a pass with two seeds rounds as
    two passes do, also where it had several. Estimates that no step used are not in the journal and drift all the same.

    Args:
        first: how many tensors of the run come before those perturbed in place.
        eps: distance of a probe.
        signs: of the probes of a query.
        distribution: ``"gaussian"`` or ``"rademacher"``.
    """

    first: int
    eps: float
    signs: tuple[float, ...]
    distribution: str

    @classmethod
    def of(cls, header: dict) -> "Drift | None":
        """Return that of the run that a journal's header describes, None where nothing was perturbed in place."""
        config = header["config"]
        if config.get("perturb") != "in-place":
            return None
        first = 1 if header["sites"] else 0
        return cls(first, config["eps"], probe_signs(config["difference"]), header["distribution"])

    def redo(self, tensors: list[torch.Tensor], seeds: Iterable[int]) -> None:
        """Move the parameters to every probe of the seeds and back."""
        offset = sum(t.numel() for t in tensors[: self.first])
        with InPlace(tensors[self.first :], offset=offset, distribution=self.distribution) as others:
            for seed in seeds:
                for sign in self.signs:
                    others.move_to(seed, sign * self.eps)
