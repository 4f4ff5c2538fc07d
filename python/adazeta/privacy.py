"""Differentially private steps: a bound on what an example can add to a step, and noise that hides whether it did.

The directions of a step are public. What a step learns from the data is one vector: the loss differences of the batch,
one per query. Every example's vector is clipped as a whole, their sum gets Gaussian noise, and nothing else of the data
leaves the step: coefficients, update and journal are made of the noised sum. However many queries a step has, it is one
Gaussian mechanism, so steps alone are composed. Examples enter a step independently of each other
(:class:`PoissonBatches`), which is what the accountant assumes; neighbouring data sets differ by one example more or
less. docs/private.md says what is promised and what is not.

Source: DP-ZO (arXiv 2401.04343) and DPZero (arXiv 2310.09639) for noise on scalars; DP-SGD (arXiv 1607.00133) for the
clipped sum over a Poisson sample.
"""

import math
import random
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from .errors import SettingError, UserError

# From the operating system, never from a seed: whoever could draw the noise again could take it away, and who knows
# which examples were drawn gets no protection from the drawing.
_SECRET = random.SystemRandom()
_INTERVAL = 1e-3  # of the accountant's grid of privacy losses, which it rounds to the safe side


@dataclass(frozen=True)
class Privacy:
    """The settings of a private run, and what they are worth.

    Args:
        clip: bound on the norm, over the queries of a step, of an example's loss differences
            ``l(theta + eps z_q) - l(theta - eps z_q)``, > 0.
        noise_multiplier: standard deviation of the noise on each query's sum, in units of ``clip``, > 0.
        batch_size: expected examples of a step.
        examples: examples in the training data.
        delta: probability with which the bound by epsilon may fail, below 1 / examples.

    Raises:
        ValueError: a value out of its range.
    """

    clip: float
    noise_multiplier: float
    batch_size: int
    examples: int
    delta: float = 1e-5

    def __post_init__(self):
        for name in ("clip", "noise_multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 1 <= self.batch_size <= self.examples:
            raise ValueError(f"expected 1 <= batch_size <= examples, got {self.batch_size} and {self.examples}")
        if not 0 < self.delta < 1 / self.examples:
            raise ValueError(f"delta must be in (0, 1 / {self.examples} examples), got {self.delta}")

    @classmethod
    def for_epsilon(cls, epsilon: float, *, steps: int, clip: float, batch_size: int, examples: int, delta: float):
        """Return the settings with the least noise that keeps ``steps`` steps within ``epsilon`` (to 4 digits)."""
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
        cls(clip, 1.0, batch_size, examples, delta)  # checks the others before the search
        noise = _accounting().calibrate_dp_mechanism(
            _accountant, lambda sigma: _event(sigma, batch_size / examples, steps), epsilon, delta
        )
        return cls(clip, math.ceil(noise * 1e4) / 1e4, batch_size, examples, delta)

    def epsilon(self, steps: int) -> float:
        """Return the epsilon that so many steps spend, at ``delta``.

        Numerics: an upper bound, from privacy loss distributions on a grid rounded to the safe side.

        Raises:
            UserError: the accountant library is not installed.
        """
        if steps == 0:
            return 0.0
        event = _event(self.noise_multiplier, self.batch_size / self.examples, steps)
        return float(_accountant().compose(event).get_epsilon(self.delta))

    def renyi_epsilon(self, steps: int) -> float:
        """Return :meth:`epsilon` by Renyi differential privacy: a looser bound, to check the other by."""
        _accounting()
        from dp_accounting.rdp import RdpAccountant

        event = _event(self.noise_multiplier, self.batch_size / self.examples, steps)
        return float(RdpAccountant().compose(event).get_epsilon(self.delta))

    def release(self, losses: torch.Tensor) -> torch.Tensor:
        """Return what a step may know of its examples: their mean loss differences, clipped and noised.

        ``(sum_i v_i min(1, clip / |v_i|) + noise_multiplier * clip * n) / batch_size`` with ``v_i`` the differences of
        example i over all queries and n standard normal. A difference that is not finite counts as 0.

        Args:
            losses: ``[1, Q, 2, rows]``, one loss per example at both probes of each query; maybe no rows.

        Returns:
            ``[1, Q, 2, 1]`` float64: for each query a value whose two signs differ by the result, and 0.
        """
        losses = losses[0].double()
        differences = losses[:, 0] - losses[:, 1]
        differences = torch.where(torch.isfinite(differences), differences, 0.0)
        norms = differences.square().sum(0).sqrt()
        total = (differences * (self.clip / norms.clamp(min=self.clip))).sum(1)
        noise = torch.tensor([_normal() for _ in total], dtype=torch.float64)
        mean = (total + self.noise_multiplier * self.clip * noise) / self.batch_size
        return torch.stack((mean, torch.zeros_like(mean)), 1)[None, :, :, None]

    def check_rows(self, loss_fn, *, mix: bool) -> None:
        """Check that an example's losses are its own, as clipping counts on; a ``SettingError`` says if not."""
        if mix or any(hasattr(loss_fn, name) for name in ("per_row", "of_probes")):
            raise SettingError(
                "private steps bound what an example adds by its own losses, and here the loss of a row depends on the "
                "other rows: take a loss that gives every row its own"
            )

    def check(self, optimizer) -> None:
        """Check that a ``ZerothOrder`` with these settings lets nothing else out; a ``ValueError`` says what not."""
        if optimizer.directions != "batch":
            raise ValueError(
                f"private steps need directions='batch' (all examples share them), got {optimizer.directions!r}"
            )
        if optimizer.difference != "central":
            raise ValueError(f"private steps take central differences, got difference={optimizer.difference!r}")
        if optimizer.guard.policy == "rollback":
            raise ValueError("on_divergence='rollback' looks at losses, which a private run does not tell; use 'stop'")
        if optimizer.ranks is not None and optimizer.ranks.columns > 1:
            raise ValueError(
                "an example's differences are clipped over all queries of a step: ranks of a private run share data, "
                f"not queries; expected data={optimizer.ranks.size}, got {optimizer.ranks.data}"
            )


class PoissonBatches:
    """A batch sampler that lets every example into a batch with probability ``batch_size / examples``, by itself.

    Batches differ in size and may be empty; which examples they hold is drawn from the operating system, so no one can
    draw them again. A resumed run draws others, which changes nothing in what is promised.

    Args:
        privacy: whose ``batch_size`` and ``examples`` count.
    """

    def __init__(self, privacy: Privacy):
        self.privacy, self.batch_size = privacy, privacy.batch_size

    def __len__(self) -> int:
        """Batches of an epoch, on average one look at each example."""
        return -(-self.privacy.examples // self.privacy.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        examples, batch_size = self.privacy.examples, self.privacy.batch_size
        for _ in range(len(self)):
            yield [index for index in range(examples) if _SECRET.randrange(examples) < batch_size]


def private_loader(privacy: Privacy, args, dataset: Sized, collate: Callable[[list], dict]) -> DataLoader:
    """Return the Trainer's loader of :class:`PoissonBatches`; a batch without an example is ``{}``.

    Raises:
        SettingError: ``args`` and ``dataset`` give other batches than those that ``privacy`` counts on.
    """
    found = args.per_device_train_batch_size, len(dataset)
    if found != (privacy.batch_size, privacy.examples):
        raise SettingError(
            f"privacy is counted for batches of {privacy.batch_size} of {privacy.examples} examples, got batches of "
            f"{found[0]} of {found[1]}"
        )
    if args.gradient_accumulation_steps != 1:
        raise SettingError(
            f"a private step has one batch, got gradient_accumulation_steps={args.gradient_accumulation_steps}; take a "
            "larger batch instead, a forward holds as much of it as memory allows"
        )
    return DataLoader(
        dataset,
        batch_sampler=PoissonBatches(privacy),
        collate_fn=lambda rows: collate(rows) if rows else {},
        num_workers=args.dataloader_num_workers,
    )


def _normal() -> float:
    # Of four values: that of one would show through the gaps of float64 which value it was added to
    # (Mironov 2012; the sum is from Holohan and Braghin, arXiv 2107.10138).
    return sum(_SECRET.gauss(0.0, 1.0) for _ in range(4)) / 2


def _accounting():
    try:
        import dp_accounting
    except ImportError as error:
        raise UserError(
            "epsilon is counted by the library dp-accounting: pip install 'adazeta-kernels[private]'"
        ) from error
    return dp_accounting


def _accountant():
    _accounting()
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(value_discretization_interval=_INTERVAL)


def _event(noise_multiplier: float, rate: float, steps: int):
    dp = _accounting()
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise_multiplier)), steps)
