"""Batches of examples of similar length, in an order that a resumed run finds again."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from .data import row_tokens


def real_length(row: Mapping[str, Any]) -> int:
    """Return the tokens of an example, without those that its own attention mask leaves out."""
    return int(sum(row["attention_mask"])) if row.get("attention_mask") is not None else row_tokens(row)


class LengthGrouped:
    """Sample indices so that the examples of a batch have similar lengths, in an order fixed by seed and epoch.

    The shuffled examples are cut into pools of 50 batches, each pool is sorted by length and cut into batches, and the
    batches are shuffled. ``transformers`` has such a sampler too, but its order depends on what else has drawn from the
    global generator, so that a resumed run would see other batches.

    Args:
        lengths: length of every example.
        batch_size: examples per step.
        seed: any integer.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        indices = list(range(len(self.lengths)))
        generator.shuffle(indices)
        pool, size = 50 * self.batch_size, self.batch_size
        ordered: list[int] = []
        for first in range(0, len(indices), pool):
            ordered += sorted(indices[first : first + pool], key=self.lengths.__getitem__, reverse=True)
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        rest = batches.pop() if len(batches[-1]) < size else []  # a smaller batch must stay the last one
        generator.shuffle(batches)
        return iter([index for batch in [*batches, rest] for index in batch])


class EpochOfSampler(TrainerCallback):
    """Tell the sampler its epoch: the Trainer's own call does not reach it behind the batches that a resume skips."""

    def __init__(self, sampler: LengthGrouped):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
