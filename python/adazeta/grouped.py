"""``ZOTrainer`` with batches of similar length whose order a resumed run finds again."""

from transformers import TrainerCallback

from adazeta.data import LengthGrouped
from adazeta.trainer import ZOTrainer


class LengthGroupedTrainer(ZOTrainer):
    """Train on batches of similar length.

    Args:
        group_by_length: False leaves the order to the Trainer.
        *args, **kwargs: those of ``ZOTrainer``.
    """

    def __init__(self, *args, group_by_length: bool = True, **kwargs):
        self.group_by_length = group_by_length
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = LengthGrouped([len(row["input_ids"]) for row in dataset], batch, seed)
        self.add_callback(_Epoch(sampler))
        return sampler


class _Epoch(TrainerCallback):
    # The Trainer's own set_epoch does not reach a sampler behind the batches that a resumed run skips.
    def __init__(self, sampler: LengthGrouped):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
