"""One run on many machines: ranks exchange a few numbers per step, never gradients or weights.

Ranks form a grid of data x queries. Ranks of one row hold the same examples and share out the step's queries, so that
each direction is probed by one of them; ranks of one column probe the same directions on examples of their own. One
all-gather per step brings everybody 8 bytes per query and 48 more from every rank; all then make the same update, which
a digest of theta in the same message checks every few steps::

    torch.distributed.init_process_group("gloo")  # torchrun sets the rest
    opt = ZerothOrder(model, queries=16, ranks=Ranks())
    open_journal(opt, "run/journal.azj")

Source: design after MeZO's seeds (arXiv 2305.17333): a step is known by its seeds and scalars.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .errors import UserError
from .journal import read
from .journal_format import difference, shown
from .recording import describe_run
from .update import Trainable

_HEAD = 6  # numbers ahead of those of the queries: rows of a probe, loss sum, finite losses, rows, losses, digest


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
        check_every: steps after which all ranks compare a digest of theta.
        group: a process group of ``torch.distributed``; all ranks by default.

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
        # A group of NCCL alone carries what is on the GPU. Untested: no machine with one was at hand.
        self._device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"

    def queries(self, number: int, rank: int | None = None) -> range:
        """Return the queries (of each group) that a rank, by default this one, probes; maybe none."""
        column = (self.rank if rank is None else rank) % self.columns
        return range(column * number // self.columns, (column + 1) * number // self.columns)

    def gather(
        self, losses: torch.Tensor, queries: int, step: int, digest: int, rows: int, *, central: bool
    ) -> Gathered:
        """Exchange what every rank found.

        Args:
            losses: ``[G, own queries, S, rows]`` float32, this rank's.
            queries: queries of the step in each group, over all ranks.
            step: step number, to say when ranks part.
            digest: CRC-32 of theta, or 0 where none is due.
            rows: forward rows of this rank.
            central: two probes a query whose difference counts.

        Raises:
            RuntimeError: ranks hold another theta, or another number of examples in a row of the grid.

        Numerics: losses are summed in float64, exactly as long as they differ by less than 2^20 in size, so the result
        does not depend on how they are spread over ranks.
        """
        groups, _, signs, rows_per_probe = losses.shape
        sums = losses.double().sum(-1)
        own = (sums[..., 0] - sums[..., 1] if central else sums[..., 0]).reshape(-1)
        finite = losses[torch.isfinite(losses)].double()
        most = groups * max(len(self.queries(queries, rank)) for rank in range(self.columns))
        message = torch.zeros(_HEAD + most, dtype=torch.float64)
        head = (rows_per_probe, float(finite.sum()), len(finite), rows, losses.numel(), digest)
        message[:_HEAD] = torch.tensor(head, dtype=torch.float64)
        message[_HEAD : _HEAD + len(own)] = own
        received = self._exchange(message)
        heads = received[:, :_HEAD]
        self._check(heads, step)
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
        sizes = self._exchange(torch.tensor([examples])).flatten().tolist()
        if len(set(sizes)) > 1:
            raise RuntimeError(f"step {step}: ranks that share queries got batches of {[sizes]} examples")

    def _exchange(self, message: torch.Tensor) -> torch.Tensor:
        """Return the messages of all ranks, ``[ranks, length]``; all have to be of one length."""
        message = message.to(self._device)
        received = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(received, message, group=self.group)
        return torch.stack(received).cpu()

    def _check(self, heads: torch.Tensor, step: int) -> None:
        digests = heads[:, 5].tolist()
        if len(set(digests)) > 1:
            other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise RuntimeError(f"before step {step} theta on rank {other[0]} differs from that on rank 0")
        sizes = heads[:, 0].view(self.data, self.columns)
        if (sizes != sizes[:, :1]).any():
            raise RuntimeError(f"step {step}: ranks that share queries got batches of {sizes.int().tolist()} examples")

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

    def agree(self, optimizer) -> None:
        """Check that all ranks run the same code with the same settings on the same weights.

        Raises:
            UserError: on every rank, naming the first entry that differs.
        """
        header, _ = describe_run(optimizer, {"data_ranks": self.data, "ranks": self.size})
        headers: list = [None] * self.size
        dist.all_gather_object(headers, header, group=self.group)
        for rank, other in enumerate(headers):
            key = difference(headers[0], other)
            for name in ("initial_sha256", "software"):
                if not key and headers[0][name] != other[name]:
                    key = name
            if key:
                raise UserError(
                    f"rank {rank} has another {key} than rank 0: {shown(other, key)}, expected {shown(headers[0], key)}"
                )

    def share(self, value):
        """Return rank 0's ``value`` on every rank."""
        values, source = [value], dist.get_global_rank(self.group or dist.group.WORLD, 0)
        dist.broadcast_object_list(values, src=source, group=self.group)
        return values[0]


def open_journal(optimizer, path: str | os.PathLike, resume: bool = False, **keywords) -> None:
    """Record a run of many ranks: rank 0 writes the journal, and with ``resume`` all take its steps up.

    Args:
        optimizer: a ``ZerothOrder`` with ``ranks``.
        path: the journal, on rank 0's machine.
        resume: go on with it; a rank that was killed rejoins the others in this way.
        **keywords: those of ``ZerothOrder.write_journal``.

    Raises:
        UserError: the journal cannot be used (on every rank), or ranks disagree.
        RuntimeError: rank 0 failed in another way.
    """
    ranks = optimizer.ranks
    ranks.agree(optimizer)
    content = failure = told = None
    if ranks.rank == 0:
        try:
            optimizer.write_journal(path, resume, **keywords)
            found = read(path)
            own = optimizer.trainable()
            numbers = Trainable([t.cpu() for t in own.tensors], [], [m.cpu() for m in own.momentum])
            content = found.steps, found.header, numbers
        except Exception as error:  # of any kind: the others wait to be told
            failure = error
            kind = UserError if isinstance(error, UserError) else RuntimeError
            told = kind, f"rank 0: {type(error).__name__}: {error}"
    content, told = ranks.share((content, told))
    if failure is not None:
        raise failure
    if told is not None:
        kind, text = told
        raise kind(text)
    if ranks.rank:
        steps, header, numbers = content
        optimizer.take(numbers)  # the journal may begin with others
        optimizer.take_up(steps, header)
