"""Every field of ``transformers.TrainingArguments``: what works in a ``ZOTrainer``, what is of no effect, what raises.

``WORKS`` names the fields that do what transformers says; ``IGNORED`` and ``REFUSED`` say why not. A field in none of
them is new, and the test of this table names it.
"""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from .others import check_unwrapped

_ONE_PROCESS = "processes share queries or data through adazeta.distributed, not through replicas with gradients"
_TRANSFORMERS = "transformers does not look at it either: it is for scripts"
_ADAM = "there are no moments of a gradient; ZOConfig has momentum, and combine='spread' normalises the step"
_OPTIMIZER = "the step is the zeroth-order one of ZOConfig"
_BACKWARD = "it saves memory of a backward pass, and there is none: activations are freed as the forward goes"
_COMPILE = "a step runs parts of the model at many perturbed points, which a compiled forward of the whole is not"
_SHARDS = "it shards a model that gradients flow through; here the base is frozen and its adapter small: use device_map"
_FULL_EVAL = "it would round the float32 numbers that are trained; load the base model in that format"

WORKS = (
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps weight_decay gradient_accumulation_steps label_smoothing_factor bf16 tf32 "
    "use_cache torch_empty_cache_steps logging_strategy logging_steps logging_first_step logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level disable_tqdm report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size "
    "prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
    "include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_total_limit "
    "enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip "
    "restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config "
    "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns "
    "label_names train_sampling_strategy debug skip_memory_metrics "
    "logging_dir warmup_ratio"
).split()

IGNORED = {
    "average_tokens_across_devices": "losses are means per row, not per token of all devices",
    "length_column_name": "group_by_length counts the tokens of the rows themselves",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _TRANSFORMERS),
    "resume_from_checkpoint": f"{_TRANSFORMERS}; give it to train()",
    **dict.fromkeys(("log_on_each_node", "log_level_replica", "save_on_each_node", "local_rank"), _ONE_PROCESS),
    **dict.fromkeys(
        [f"ddp_{name}" for name in "find_unused_parameters bucket_cap_mb broadcast_buffers static_graph".split()],
        _ONE_PROCESS,
    ),
    **dict.fromkeys(("ddp_backend", "ddp_timeout"), _ONE_PROCESS),
}

REFUSED = {
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), _OPTIMIZER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _ADAM),
    "max_grad_norm": "there is no gradient to clip; ZOConfig(clip=...) bounds the projected gradients of a step",
    "fp16": "its gradient scaler has no gradients to scale; load the base model in float16, or use bf16",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _FULL_EVAL),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), _BACKWARD),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), _BACKWARD),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILE),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "it speeds up backward passes; losses here score few"),
    "neftune_noise_alpha": "noise that differs from probe to probe would hide the differences that are measured",
    "auto_find_batch_size": "a forward that runs out of memory is taken in halves, and the batch stays as it is",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _SHARDS),
}

#: Arguments of ``Trainer`` that are about gradients.
NOT_TAKEN = {
    "compute_loss_func": "give loss=..., a function (model, batch) -> one loss per row",
    "optimizers": f"{_OPTIMIZER}; lr_scheduler_type chooses its schedule",
    "optimizer_cls_and_kwargs": _OPTIMIZER,
}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what ``args`` ask for that a zeroth-order step has no use for.

    Raises:
        ValueError: fields of ``REFUSED`` that are neither at their default nor off; it names each, and why.
    """
    asked = []
    for field in fields(args):
        default = field.default_factory() if field.default is MISSING else field.default
        value = getattr(args, field.name)
        # Earlier versions of transformers fill in fsdp_config, where it is not asked for, with what is off.
        on = any(value.values()) if isinstance(value, Mapping) else value
        if field.name in REFUSED and on and value != default:
            asked.append(f"{field.name}={_text(value)}: {REFUSED[field.name]}")
    if asked:
        raise ValueError(f"TrainingArguments that ZOTrainer does not take: {'; '.join(asked)}")


def check_one_gpu(args: TrainingArguments | None) -> None:
    """Raise ValueError where transformers would spread every batch over several GPUs, before it makes a folder."""
    if (args.n_gpu if args is not None else torch.cuda.device_count()) > 1:
        raise ValueError("ZOTrainer does not use DataParallel; show it one GPU with CUDA_VISIBLE_DEVICES")


def check_trainer_arguments(kind: type[Trainer], *args, **kwargs) -> None:
    """Refuse arguments of ``Trainer`` itself, given in any order to the class ``kind``: of gradients, and replicas.

    Raises:
        TypeError: the model is wrapped in ``DataParallel`` or the like.
        ValueError: one of ``NOT_TAKEN``, or a ``compute_loss`` of its own, which no zeroth-order step calls.
    """
    if kind.compute_loss is not Trainer.compute_loss:
        reason = NOT_TAKEN["compute_loss_func"]
        raise ValueError(f"ZOTrainer does not call compute_loss, which {kind.__name__} overrides: {reason}")
    given: Mapping[str, Any] = inspect.signature(Trainer).bind_partial(*args, **kwargs).arguments
    check_unwrapped(given.get("model"))
    for name, reason in NOT_TAKEN.items():
        if given.get(name) not in (None, (None, None)):
            raise ValueError(f"ZOTrainer does not take {name}: {reason}")


def _text(value: Any) -> str:
    text = str(getattr(value, "value", value))
    return text if len(text) <= 60 else f"{text[:57]}..."
