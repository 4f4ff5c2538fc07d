"""One run on many machines: ranks exchange a few numbers per step, never gradients or weights.

Ranks form a grid of data x queries. Ranks of one row hold the same examples and share out the step's queries, so that
each direction is probed by one of them; ranks of one column probe the same directions on examples of their own. One
all-gather per step brings everybody 8 bytes per query and 64 more from every rank; all then make the same update, which
the learning rate and, every few steps, a digest of theta in the same message check::

    ranks = join()  # None where torchrun did not start several processes
    opt = ZerothOrder(model, queries=16, ranks=ranks)
    open_journal(opt, "run/journal.azj")

Source: design after MeZO's seeds (arXiv 2305.17333): a step is known by its seeds and scalars.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .digests import code_sha256, crc_of
from .errors import ToldEverywhere, UserError
from .joining import begin_group, reason_of
from .journal import read
from .journal_format import difference, shown
from .probes import batch_size, take_rows
from .recording import describe_run
from .replay import initial_values
from .update import Trainable

# Numbers ahead of those of the queries: rows of a probe, loss sum, finite losses, rows, losses, digest, stop, rate.
_HEAD = 8
TIMEOUT = timedelta(minutes=30)  # rank 0 may evaluate while the others wait for it
LATE, INTERRUPTED = 1, 2  # why a rank wants to stop


@dataclass
class Gathered:
    """What all ranks together found in one estimate.

    Args:
        sums: ``[G, Q, S]`` float64, summed over the examples of all ranks; for central differences the difference of
            the two sums and 0.
        rows_per_probe: examples behind each sum.
        loss: mean of all finite losses, NaN where there is none.
        rows, losses: cost over all ranks.
    """

    sums: torch.Tensor
    rows_per_probe: int
    loss: float
    rows: int
    losses: int


class Ranks:
    """The place of this process among others, and what it exchanges with them.

    Args:
        data: ranks that the data is spread over; the number of all ranks must be a multiple of it.
        check_every: steps after which all ranks compare a digest of theta, as they do at the first step of their own.
        group: a process group of ``torch.distributed``; all ranks by default.

    ``stop`` is this rank's wish to end the run, for a reason that others do not see, such as a clock: ``LATE`` or
    ``INTERRUPTED``. It goes out with the next message; then ``stopping`` is the same on all ranks, the largest wish.

    Raises:
        ValueError: the number of ranks is no multiple of ``data``.
    """

    def __init__(self, data: int = 1, *, check_every: int = 16, group=None):
        self.size, self.rank, self.group = dist.get_world_size(group), dist.get_rank(group), group
        if data < 1 or self.size % data:
            raise ValueError(f"{self.size} ranks cannot be {data} parts of the data: expected a divisor")
        if check_every < 1:
            raise ValueError(f"check_every must be at least 1, got {check_every}")
        self.data, self.columns, self.check_every = data, self.size // data, check_every
        self.stop = self.stopping = 0
        # A group of NCCL alone carries what is on the GPU. Untested: no machine with one was at hand.
        self._device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"

    def queries(self, number: int, rank: int | None = None) -> range:
        """Return the queries (of each group) that a rank, by default this one, probes; maybe none."""
        column = (self.rank if rank is None else rank) % self.columns
        return range(column * number // self.columns, (column + 1) * number // self.columns)

    def part(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's examples of a batch that all ranks hold, maybe none: :func:`adazeta.probes.take_rows`."""
        number, row = batch_size(batch), self.rank // self.columns
        return take_rows(batch, torch.arange(row * number // self.data, (row + 1) * number // self.data))

    def gather(
        self, losses: torch.Tensor, queries: int, step: int, digest: int, rows: int, *, lr: float, central: bool
    ) -> Gathered:
        """Exchange what every rank found.

        Args:
            losses: ``[G, own queries, S, rows]`` float32, this rank's.
            queries: queries of the step in each group, over all ranks.
            step: step number, to say when ranks part.
            digest: CRC-32 of theta, or 0 where none is due.
            rows: forward rows of this rank.
            lr: learning rate of the step.
            central: two probes a query whose difference counts.

        Raises:
            ToldEverywhere: ranks hold another theta, learning rate, or number of examples in a row of the grid.

        Numerics: losses are summed in float64, exactly as long as they differ by less than 2^20 in size, so the result
        does not depend on how they are spread over ranks.
        """
        groups, _, signs, rows_per_probe = losses.shape
        sums = losses.double().sum(-1)
        own = (sums[..., 0] - sums[..., 1] if central else sums[..., 0]).reshape(-1)
        finite = losses[torch.isfinite(losses)].double()
        most = groups * max(len(self.queries(queries, rank)) for rank in range(self.columns))
        message = torch.zeros(_HEAD + most, dtype=torch.float64)
        head = (rows_per_probe, float(finite.sum()), len(finite), rows, losses.numel(), digest, self.stop, lr)
        message[:_HEAD] = torch.tensor(head, dtype=torch.float64)
        message[_HEAD : _HEAD + len(own)] = own
        received = self._exchange(message, f"step {step}")
        heads = received[:, :_HEAD]
        self._check(heads, step)
        self.stopping = int(heads[:, 6].max())
        total = torch.zeros(groups, queries, signs, dtype=torch.float64)
        for rank, part in enumerate(received):
            mine = self.queries(queries, rank)
            values = part[_HEAD : _HEAD + groups * len(mine)].view(groups, len(mine))
            total[:, mine.start : mine.stop, 0] += values
        examples = int(heads[:: self.columns, 0].sum())
        number = heads[:, 2].sum()
        loss = float(heads[:, 1].sum() / number) if number else float("nan")
        return Gathered(total, examples, loss, int(heads[:, 3].sum()), int(heads[:, 4].sum()))

    def same_batch(self, examples: int, step: int) -> None:
        """Check that the batches of all ranks are equally large, where the length of a message depends on that.

        Raises:
            RuntimeError: they are not.
        """
        sizes = self._exchange(torch.tensor([examples]), f"step {step}").flatten().tolist()
        if len(set(sizes)) > 1:
            raise RuntimeError(f"step {step}: ranks that share queries got batches of {[sizes]} examples")

    def _exchange(self, message: torch.Tensor, when: str) -> torch.Tensor:
        """Return the messages of all ranks, ``[ranks, length]``; all have to be of one length."""
        message = message.to(self._device)
        received = [torch.empty_like(message) for _ in range(self.size)]
        with self._reaching(when):
            dist.all_gather(received, message, group=self.group)
        return torch.stack(received).cpu()

    @contextmanager
    def _reaching(self, when: str):
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL have no kind of their own
            raise UserError(
                f"{when}: rank {self.rank} no longer reaches the other ranks ({reason_of(error)}); one of them may say "
                "why; start all again, they go on from the journal"
            ) from error

    def _check(self, heads: torch.Tensor, step: int) -> None:
        _check_theta(heads[:, 5].tolist(), f"before step {step}")
        rates = heads[:, 7].tolist()
        for rank, rate in enumerate(rates):
            if rate != rates[0]:
                raise ToldEverywhere(
                    f"step {step}: rank {rank} has another learning rate than rank 0: {rate}, expected {rates[0]}"
                )
        sizes = heads[:, 0].view(self.data, self.columns)
        if (sizes != sizes[:, :1]).any():
            raise ToldEverywhere(
                f"step {step}: ranks that share queries got batches of {sizes.int().tolist()} examples"
            )

    def check_end(self, optimizer) -> None:
        """Check, behind the last step, that all ranks end with the same theta.

        Raises:
            ToldEverywhere: they do not.
        """
        digest = torch.tensor([crc_of(optimizer.trainable().tensors)], dtype=torch.float64)
        when = f"after step {optimizer.step_index - 1}"
        _check_theta(self._exchange(digest, when).flatten().tolist(), when)

    def check(self, optimizer) -> None:
        """Check that many ranks can do what the settings of ``optimizer`` ask for; a ``ValueError`` says what not."""
        if optimizer.guard.policy == "rollback":
            raise ValueError("on_divergence='rollback' needs the journal, which only one of the ranks has; use 'stop'")
        if optimizer.others:
            raise ValueError(
                f"ranks share the training of an adapter alone, {next(iter(optimizer.others))} trains too: freeze it, "
                "or train in one process"
            )
        if self.data > 1 and optimizer.directions != "batch":
            raise ValueError(f"data is spread over ranks that share directions='batch', got {optimizer.directions!r}")

    def check_loss(self, loss_fn: Callable) -> None:
        """Check that a mean over ranks is a mean over examples; a ``ValueError`` says of which loss it is not."""
        if self.data > 1 and hasattr(loss_fn, "of_probes"):
            raise ValueError(
                f"the data is spread over {self.data} parts, and this loss is one of all examples of a probe together "
                "(the F1 of classes): leave the data in one part, so that ranks share out queries alone"
            )

    def agree(self, optimizer, identity: Mapping[str, Any] | None = None) -> None:
        """Check that all ranks run the same code with the same settings on the same weights.

        Args:
            optimizer: a ``ZerothOrder``.
            identity: further JSON values that have to be the same, such as a digest of the data.

        Raises:
            UserError: on every rank, naming the first entry that differs.
        """
        grid = {"data_ranks": self.data, "ranks": self.size}
        own = {**optimizer.defaults, **grid, "on_divergence": optimizer.guard.policy, **(identity or {})}
        header = self.together(lambda: {**describe_run(optimizer, own)[0], "code": code_sha256()}, "start")
        all_headers = self.gather_objects((header, optimizer.step_index), "start")
        first, first_step = all_headers[0]
        for rank, (other, step) in enumerate(all_headers):
            key = difference(first, other)
            # A rank that has loaded a checkpoint has other numbers than one that is to take them from the journal.
            for name in ("initial_sha256", "software") if step == first_step else ("software",):
                if not key and first[name] != other[name]:
                    key = name
            if key:
                raise ToldEverywhere(
                    f"rank {rank} has another {key} than rank 0: {shown(other, key)}, expected {shown(first, key)}"
                )

    def alike(self, values: Mapping[str, Any], when: str) -> None:
        """Check that all ranks have the same ``values``.

        Raises:
            ToldEverywhere: naming the first that differs.
        """
        first, *others = self.gather_objects(dict(values), when)
        for rank, other in enumerate(others, 1):
            for name in (name for name in first if other[name] != first[name]):
                raise ToldEverywhere(
                    f"rank {rank} has another {name} than rank 0: {other[name]}, expected {first[name]}"
                )

    def together(self, work: Callable[[], Any], when: str) -> Any:
        """Return ``work()``; where it fails on a rank it fails on all, which else would wait for that rank.

        Args:
            work: what every rank does; nothing in it may wait for other ranks.
            when: what it is, for the error where a rank can't be reached.

        Raises:
            ToldEverywhere: ``work`` raised a ``UserError`` on a rank; on every rank, naming the first such.
            RuntimeError: it raised something else.
        """
        result = failure = told = None
        try:
            result = work()
        except Exception as error:  # of any kind: the others wait to be told
            failure, kind = error, ToldEverywhere if isinstance(error, UserError) else RuntimeError
            told = kind, f"{error}" if kind is ToldEverywhere else f"{type(error).__name__}: {error}"
        for rank, other in enumerate(self.gather_objects(told, when)):
            if other is not None:
                kind, text = other
                raise kind(f"rank {rank}: {text}") from failure
        return result

    def gather_objects(self, value, when: str) -> list:
        """Return the values of all ranks."""
        values: list = [None] * self.size
        with self._reaching(when):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value, when: str):
        """Return rank 0's ``value`` on every rank."""
        values, source = [value], dist.get_global_rank(self.group or dist.group.WORLD, 0)
        with self._reaching(when):
            dist.broadcast_object_list(values, src=source, group=self.group)
        return values[0]


def join(data: int = 1, *, timeout: timedelta = TIMEOUT, **keywords) -> Ranks | None:
    """Return the place of this process among those that ``torchrun`` started; None where it started no other.

    A process group that there is already is taken, of gloo or NCCL. Else one of gloo is begun, on GPUs too: messages of
    a hundred bytes gain nothing there.

    Args:
        data, **keywords: those of ``Ranks``.
        timeout: how long a rank waits for the others, at first and in every exchange.

    Raises:
        UserError: the others did not come.
    """
    return Ranks(data, **keywords) if begin_group(timeout) else None


def _check_theta(digests: list[float], when: str) -> None:
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ToldEverywhere(f"{when} theta on rank {rank} differs from that on rank 0")


def open_journal(
    optimizer, path: str | os.PathLike, resume: bool = False, *, alike: Mapping[str, Any] | None = None, **keywords
) -> None:
    """Record a run of many ranks: rank 0 writes the journal, and with ``resume`` all take its steps up.

    Args:
        optimizer: a ``ZerothOrder``; one without ``ranks`` (``join()`` is None in a process alone) writes its own.
        path: the journal, on rank 0's machine.
        resume: go on with it; a rank that was killed rejoins the others in this way.
        alike: JSON values that all ranks, but not a resumed run, have to share.
        **keywords: those of ``ZerothOrder.write_journal``.

    Raises:
        UserError: the journal cannot be used (on every rank), or ranks disagree.
        RuntimeError: rank 0 failed in another way.
    """
    ranks = optimizer.ranks
    if ranks is None:
        optimizer.write_journal(path, resume, **keywords)
        return
    ranks.agree(optimizer, {**(keywords.get("identity") or {}), **(alike or {})})

    def begin():
        if ranks.rank:
            return None
        journal = optimizer.write_journal(path, resume, **keywords)
        steps = read(path).steps
        if back := next((step for step in steps if step.back_to is not None), None):
            journal.close()
            raise UserError(
                f"{path} goes back at step {back.index}, which takes the journal, and only one rank has it: go on "
                "in one process"
            )
        initial = initial_values(journal.header, journal.path).trainable
        return steps, journal.header, Trainable(initial.tensors, [])

    def take_up():
        if optimizer.step_index > len(steps):
            raise UserError(f"its checkpoint is at step {optimizer.step_index}, the journal holds {len(steps)}")
        if optimizer.step_index == 0:
            optimizer.take(initial)  # the journal may begin with others
        optimizer.take_up(steps, header)

    steps, header, initial = ranks.share(ranks.together(begin, "journal"), "journal")
    ranks.together(take_up if ranks.rank else lambda: None, "journal")
