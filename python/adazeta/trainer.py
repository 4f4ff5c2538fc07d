"""``ZOTrainer``: ``transformers.Trainer`` with forward passes in place of the backward pass.

Logging, evaluation, callbacks, checkpoints and resume are the Trainer's own; only the optimizer, the training step and
what depends on them are overridden. ``adazeta.arguments`` accounts for every field of ``TrainingArguments``.
"""

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import AutocastKwargs, DistributedType
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from .arguments import check_arguments, check_one_gpu, check_trainer_arguments
from .batches import onto
from .config import ZOConfig
from .distributed import Ranks, open_journal
from .errors import UserError
from .estimator import signal_to_noise
from .evaluate import judge
from .files import make_folder, sync_tree
from .grouped import EpochOfSampler, LengthGrouped, real_length
from .journal import NAME as JOURNAL_NAME
from .losses import Completion, lm_loss
from .memory import MIB, peak_bytes
from .model_card import NAME as CARD_NAME
from .model_card import describe_trainer, model_card
from .optimizer import ZerothOrder
from .privacy import private_loader
from .probes import check_mask
from .quantized import all_finite, trains_adapters
from .scoring import kind_of


class ZOTrainer(Trainer):
    """Fine-tune a model by zeroth-order steps.

    Args:
        zo: the settings of the step; the learning rate, its schedule, weight decay and the rest are ``args``'.
        loss: ``loss(model, batch) -> [rows]``, one float32 loss per row; by default the next-token loss of the labels.
            What an objective of ``adazeta.objectives`` stands for is evaluated in its place.
        journal: write ``journal.azj`` into ``args.output_dir``. A run that is resumed from a checkpoint goes on with
            the journal that is there; ``"resume"`` does so without a checkpoint too, from the first step. Steps that
            the journal holds are done again without a forward.
        identity: JSON values for the journal that a resumed run must share, such as a digest of the data.
        about: JSON values for the journal that it need not share.
        fsync_every: steps after which the journal is forced to the disk; 0 for only before checkpoints and at the end.
        ranks: what ``adazeta.distributed.join()`` returns: this process among those that torchrun started. All of them
            read the same batches and share out the queries of a step, or the batch in ``ranks.data`` parts, so
            ``args.per_device_train_batch_size`` is the whole batch; all evaluate; the first writes.
        **kwargs: those of ``transformers.Trainer``.

    Raises:
        TypeError: a model inside ``DataParallel`` or the like.
        ValueError: several GPUs in a process, several processes without ``ranks``, the default loss for a model without
            a language-model head, or arguments that make no sense without gradients; each is named, with the reason,
            before anything is written.

    ``train_sampling_strategy="group_by_length"`` takes ``adazeta.grouped.LengthGrouped``, whose order a resumed run
    finds again. With ``load_best_model_at_end`` the numbers of the best evaluation come out of the journal, which
    records that the run went back to them; so it replays to what is saved.

    Logs hold, besides the Trainer's ``loss`` and ``learning_rate``: of the last step ``zo/queries``,
    ``zo/projected_grad_std`` (their spread around zero, which is their mean, for z and -z are as likely) and ``zo/snr``
    (``adazeta.estimator.signal_to_noise``, of central differences of two queries or more); so far ``rows`` (sequences
    through the model), ``zo/losses``, ``zo/dropped`` queries, ``tokens`` and ``real_tokens``, with padding and without;
    ``rows_per_second`` since the last log, and ``peak_mib`` of the device's memory, on a CPU of the process's. With a
    cache of the blocks below the first adapter also ``prefix_hits``, ``prefix_misses`` (examples so far) and
    ``prefix_bytes``.
    """

    def __init__(
        self,
        model=None,
        args=None,
        *rest,
        zo: ZOConfig | None = None,
        loss: Callable | None = None,
        journal: bool | str = True,
        identity: dict | None = None,
        about: dict | None = None,
        fsync_every: int = 0,
        ranks: Ranks | None = None,
        **kwargs,
    ):
        check_trainer_arguments(type(self), model, args, *rest, **kwargs)
        if args is not None:
            check_arguments(args)
        check_one_gpu(args)
        if loss in (None, lm_loss) and model is not None:
            kind_of(model)  # without a language-model head there is no such loss
        self.zo = zo or ZOConfig()
        self.loss = _smoothed(loss, args.label_smoothing_factor if args is not None else 0.0)
        self.journal_wanted, self.identity, self.about, self.fsync_every = journal, identity or {}, about, fsync_every
        self._queries, self._from_journal = 0, False
        self._last_log = (time.perf_counter(), 0)
        self.ranks = ranks
        with trains_adapters(model):
            super().__init__(model, args, *rest, **kwargs)
        # A parameter that is perturbed where it lies would otherwise be read as it was at the first probe.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        processes = max(self.args.world_size, int(os.environ.get("WORLD_SIZE", "1")))
        if processes > 1 and ranks is None:
            raise ValueError(
                f"each of {processes} processes would train a model of its own: give ranks=adazeta.distributed.join()"
            )
        if ranks is not None and self.zo.privacy:
            raise ValueError("examples of a private step are drawn in one process; see examples/federated.py for many")
        if ranks is not None and self.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end goes back by the journal, which only one of the ranks has")
        if ranks is not None:
            ranks.check_loss(self.loss)
        # First of all: what others write when training begins waits until the journal has been found to fit.
        self.callback_handler.callbacks.insert(0, _JournalCallback(self))

    def create_accelerator_and_postprocess(self) -> None:
        if self.ranks is not None:
            # Ranks are no replicas: accelerate is not to cut the data or to exchange gradients, but only one may write.
            _ = self.args.device  # this makes the state
            state = self.args.distributed_state
            state.distributed_type, state.num_processes = DistributedType.NO, 1
            state.process_index = state.local_process_index = self.ranks.rank
        super().create_accelerator_and_postprocess()

    @property
    def zeroth_order(self) -> ZerothOrder:
        """The ``ZerothOrder`` inside whatever accelerate has wrapped around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            settings = {name: getattr(self.zo, name) for name in asdict(self.zo)}
            run_seed = settings.pop("run_seed")
            if settings["prefix_cache"] == "auto" and not self._meets_examples_again():
                settings["prefix_cache"] = "off"
            self.optimizer = ZerothOrder(
                self.model if model is None else model,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                run_seed=self.args.seed if run_seed is None else run_seed,
                steps_per_epoch=self._steps_per_epoch(),
                ranks=self.ranks,
                **settings,
            )
        return self.optimizer

    def _steps_per_epoch(self) -> int:
        args = self.args
        try:
            rows = len(self.train_dataset)
            batches = (rows if args.dataloader_drop_last else rows + args.train_batch_size - 1) // args.train_batch_size
            return max(1, -(-batches // args.gradient_accumulation_steps))
        except TypeError:  # a stream has no length: the whole run is one epoch
            return max(1, args.max_steps)

    def _meets_examples_again(self) -> bool:
        steps = self.args.max_steps
        return steps > self._steps_per_epoch() if steps > 0 else self.args.num_train_epochs > 1

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = LengthGrouped([real_length(row) for row in dataset], batch, seed)
        self.add_callback(EpochOfSampler(sampler))
        return sampler

    def get_train_dataloader(self):
        # Batches come from their loader on the CPU: their integers then keep a twin there (adazeta.batches).
        placement, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            if self.zo.privacy is None:
                return super().get_train_dataloader()
            loader = private_loader(self.zo.privacy, self.args, self.train_dataset, self.data_collator)
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.device_placement = placement

    def _prepare_input(self, data):
        return onto(data, self.args.device) if torch.is_tensor(data) else super()._prepare_input(data)

    def _get_eval_sampler(self, eval_dataset):
        if eval_dataset is not None and hasattr(eval_dataset, "__len__"):
            return SequentialSampler(eval_dataset)  # grouped by length, predictions would be in another order
        return super()._get_eval_sampler(eval_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if model.training:
            model.eval()  # dropout would differ between the two probes of a query
        if inputs:  # what is drawn for a private step may be nothing
            inputs = self._prepare_inputs(inputs if self.ranks is None else self.ranks.part(inputs))
        optimizer = self.zeroth_order
        self._from_journal = optimizer.pending > 0
        with self.compute_loss_context_manager():
            loss = optimizer.estimate(self.loss, inputs)
        if loss != loss and inputs and optimizer.rows and optimizer.step_index == 0:
            raise UserError(_explain_no_finite_loss(model))
        self._queries = optimizer.queries(optimizer.step_index, optimizer.steps_per_epoch)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        if optimizer.privacy:  # what is logged may leave the machine
            loss = math.nan
        return torch.tensor(loss / self.current_gradient_accumulation_steps, device=self.args.device)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        return self.accelerator.autocast()  # of bf16; a loss calls parts of the model, past its wrapped forward

    def floating_point_ops(self, inputs) -> int:
        return 0 if self.zo.privacy else super().floating_point_ops(inputs)  # it counts the examples that were drawn

    def _clip_grad_norm(self, model) -> None:
        """There is no gradient."""

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        """There is no gradient."""

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.optimizer is not None and self.zeroth_order.journal is not None:
                self.zeroth_order.journal.close()

    def open_journal(self) -> None:
        """Begin the journal, or go on with the one of the run that is resumed."""
        args, optimizer = self.args, self.zeroth_order
        if optimizer.step_index < self.state.global_step:
            raise ValueError(
                f"the checkpoint is of step {self.state.global_step}, but holds no state of the optimizer, whose seeds "
                "count the steps (save_only_model): begin anew with its adapter, or train(), with journal='resume'"
            )
        parts = args.gradient_accumulation_steps
        order = args.seed if args.data_seed is None else args.data_seed
        begin = optimizer.write_journal
        if self.ranks is not None:
            schedule = {"lr_scheduler_type": str(args.lr_scheduler_type), "warmup_steps": args.warmup_steps}
            begin = partial(open_journal, optimizer, alike={"max_steps": self.state.max_steps, **schedule})
        begin(
            Path(make_folder(args.output_dir) if self.is_world_process_zero() else args.output_dir) / JOURNAL_NAME,
            resume=self.journal_wanted == "resume" or optimizer.step_index > 0,
            identity={
                "batch_size": args.per_device_train_batch_size * parts,
                **({"accumulate": parts} if parts > 1 else {}),  # each has directions of its own
                "order_seed": order,
                **self.identity,
            },
            about=self.about,
            fsync_every=self.fsync_every,
        )

    def _run_epoch(self, *args, **kwargs):
        # Resumed from a checkpoint of the last step: the Trainer itself would make one more.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def create_model_card(self, *args, model_name: str | None = None, **kwargs) -> None:
        """Write README.md into ``output_dir``: of an adapter :mod:`adazeta.model_card`, else the Trainer's own."""
        if not hasattr(self.model, "peft_config"):
            super().create_model_card(*args, model_name=model_name, **kwargs)
        elif self.is_world_process_zero():
            model_card(describe_trainer(self, model_name)).save(Path(self.args.output_dir) / CARD_NAME)

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # In place of PEFT's empty form, which names folders of this machine.
        if self.optimizer is not None and hasattr(self.model, "peft_config"):
            model_card(describe_trainer(self)).save(Path(output_dir or self.args.output_dir) / CARD_NAME)

    def _save_checkpoint(self, *args, **kwargs):
        if not self.is_world_process_zero():
            return
        if self.zeroth_order.journal is not None:
            self.zeroth_order.journal.sync()  # whatever happens, no checkpoint is newer than its journal
        super()._save_checkpoint(*args, **kwargs)
        sync_tree(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        model.eval()
        check_mask(inputs)
        inputs = self._prepare_inputs(inputs)
        loss = getattr(self.loss, "stands_for", None) or self.loss
        with self.compute_loss_context_manager():
            if inputs.get("labels") is None and hasattr(loss, "scores"):  # predict() on data without answers
                return None, None if prediction_loss_only else loss.scores(model, inputs), None
            if not hasattr(loss, "scores") and not hasattr(loss, "judge"):
                return loss(model, inputs).mean(), None, None
            losses, scores, labels = judge(loss, model, inputs)
        return losses.mean(), *((None, None) if prediction_loss_only else (scores, labels))

    def _load_best_model(self) -> None:
        optimizer = self.zeroth_order
        if optimizer.journal is None:
            super()._load_best_model()
        else:  # the same bits, and the journal says so
            optimizer.go_back(optimizer.step_index - self.state.global_step + self.state.best_global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.optimizer is not None:
            logs.update(self._numbers())
        if self.zo.privacy is not None:  # the Trainer takes NaN for 0
            logs.update({name: math.nan for name in ("loss", "train_loss") if name in logs})
        super().log(logs, start_time)

    def _numbers(self) -> dict[str, float]:
        """Return what a log says besides the loss: only what the step has read from the device anyway."""
        optimizer, now = self.zeroth_order, time.perf_counter()
        seconds, rows = now - self._last_log[0], optimizer.rows - self._last_log[1]
        self._last_log = (now, optimizer.rows)
        on_gpu = self.args.device.type == "cuda"
        numbers = {
            "rows": optimizer.rows,
            "rows_per_second": rows / seconds if seconds > 0 and not self._from_journal else 0.0,
            "tokens": optimizer.tokens.processed,
            "real_tokens": optimizer.tokens.real,
            "peak_mib": (torch.cuda.max_memory_allocated(self.args.device) if on_gpu else peak_bytes()) / MIB,
            "zo/queries": self._queries,
            "zo/losses": optimizer.evaluations,
            "zo/dropped": optimizer.dropped,
            "zo/projected_grad_std": optimizer.spread,
        }
        losses = None if self._from_journal else optimizer.probe_losses
        if losses is not None and math.isfinite(ratio := signal_to_noise(losses)):
            numbers["zo/snr"] = ratio
        if optimizer.prefix is not None and optimizer.prefix.cache is not None and not optimizer.privacy:
            numbers |= {f"prefix_{name}": count for name, count in optimizer.prefix.counts().items()}
        return numbers


def _smoothed(loss: Callable | None, factor: float) -> Callable:
    """Return ``loss``, by default the next-token loss, with label smoothing.

    Raises:
        ValueError: a loss that knows no smoothing.
    """
    if not factor:
        return loss or lm_loss
    if loss is None:
        return Completion(factor).__call__  # without what judges an answer, as lm_loss
    if getattr(loss, "label_smoothing", None) is None:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(f"label_smoothing_factor={factor}: the loss {name} has no label_smoothing; smooth inside it")
    loss = copy.copy(loss)
    loss.label_smoothing = factor
    return loss


class _JournalCallback(TrainerCallback):
    """Opens the journal when training begins, once a checkpoint, if any, has been loaded."""

    def __init__(self, trainer: ZOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        optimizer = self.trainer.zeroth_order
        if hasattr(lr_scheduler, "base_lrs"):  # a checkpoint holds those of the run that wrote it
            lr_scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            # And the rate of its schedule, which may be another now: who comes from the journal alone has this one's.
            for group, factor in zip(optimizer.param_groups, getattr(lr_scheduler, "lr_lambdas", ())):
                group["lr"] = group["initial_lr"] * factor(lr_scheduler.last_epoch)
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        self.trainer._last_log = (time.perf_counter(), optimizer.rows)
        if self.trainer.journal_wanted:
            self.trainer.open_journal()
        elif self.trainer.ranks is not None:
            self.trainer.ranks.agree(optimizer)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.ranks is not None:
            self.trainer.ranks.check_end(self.trainer.zeroth_order)


def _explain_no_finite_loss(model: torch.nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            return f"every loss of the first step is NaN or infinite: the base model's {name} holds such values"
    return (
        "every loss of the first step is NaN or infinite though all parameters are finite; try float32 or a smaller eps"
    )
