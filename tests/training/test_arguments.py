"""Every argument of the Trainer: the table is whole, what makes no sense without gradients raises, the rest works."""

import os
from dataclasses import fields

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from test_trainer import dataset, trainer
from tiny import lm_batch, tiny_adapted, tiny_llama
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from adazeta import ZOConfig, ZOTrainer, arguments
from adazeta.journal import NAME, read
from adazeta.losses import CandidateLikelihood, Completion, HeadScores, lm_loss
from adazeta.replay import replay

REFUSED = {
    "optim": "sgd",
    "optim_args": "rank=4",
    "optim_target_modules": ["o_proj"],
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "fp16": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"offload": True},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"offload": True},
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "auto_find_batch_size": True,
    "deepspeed": {"zero_optimization": {"stage": 3}},
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "parallelism_config": object(),
}


def test_the_table_accounts_for_every_field():
    names = {field.name for field in fields(TrainingArguments)}
    table = [*arguments.WORKS, *arguments.IGNORED, *arguments.REFUSED]
    print("no effect:", arguments.IGNORED)
    assert not names - set(table), f"say what ZOTrainer does with {sorted(names - set(table))} in adazeta/arguments.py"
    assert len(table) == len(set(table)) and arguments.REFUSED.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", [field.name for field in fields(TrainingArguments) if field.name in REFUSED])
def test_what_has_no_use_without_gradients_raises(tmp_path, name):
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    setattr(args, name, REFUSED[name])  # of some, TrainingArguments itself wants a GPU or a package
    with pytest.raises(ValueError) as error:
        ZOTrainer(tiny_llama(1), args, train_dataset=dataset())
    assert f"{name}=" in str(error.value) and arguments.REFUSED[name] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_off_or_default_is_taken(tmp_path):
    for value in (0, None, 1.0):
        arguments.check_arguments(TrainingArguments(str(tmp_path), use_cpu=True, max_grad_norm=value))
    args = TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing=False)
    args.fsdp_config = {"min_num_params": 0, "xla": False}  # as earlier versions of transformers fill it in
    arguments.check_arguments(args)


@pytest.mark.parametrize("name", arguments.NOT_TAKEN)
def test_arguments_of_the_trainer_about_gradients_raise(tmp_path, name):
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True)
    value = (torch.optim.SGD([torch.zeros(1)]), None) if name == "optimizers" else print
    with pytest.raises(ValueError, match=f"{name}: "):
        ZOTrainer(tiny_adapted(1), args, **{name: value})
    assert not (tmp_path / "out").exists()


def test_epochs_evaluations_logs_and_checkpoints(tmp_path):
    """18 examples by 4, the last 2 left out; 4 batches an epoch, in steps of 3 and 1."""
    run = trainer(
        tmp_path,
        max_steps=-1,
        num_train_epochs=3,
        dataloader_drop_last=True,
        gradient_accumulation_steps=3,
        data=dataset(18),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=4,
        logging_first_step=True,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": 2.0, "lr_end": 0.0},
        warmup_steps=2,
    )
    run.train()
    history = run.state.log_history
    assert run.zeroth_order.steps_per_epoch == 2 and run.state.global_step == 6
    assert [line["step"] for line in history if "loss" in line] == [1, 4]
    assert [line["step"] for line in history if "eval_loss" in line] == [2, 4, 6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    rates = [step.lr for step in read(tmp_path / NAME).steps]
    assert rates == pytest.approx([0.0, 0.05, *(0.1 * (1 - k / 4) ** 2 for k in range(4))])


def script_evaluations(monkeypatch, **metrics):
    """Let the evaluations of any ZOTrainer find these values, in turn."""
    loop, remaining = ZOTrainer.evaluation_loop, {name: iter(values) for name, values in metrics.items()}

    def scripted(trainer, *args, **kwargs):
        output = loop(trainer, *args, **kwargs)
        output.metrics.update({f"eval_{name}": next(values) for name, values in remaining.items()})
        return output

    monkeypatch.setattr(ZOTrainer, "evaluation_loop", scripted)


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}


def test_the_best_model_is_what_the_journal_ends_with(tmp_path, monkeypatch):
    script_evaluations(monkeypatch, loss=[5.0, 3.0, 4.0, 3.5, 9.0, 9.0])
    run = trainer(tmp_path, max_steps=8, save_total_limit=1, callbacks=[EarlyStoppingCallback(3)], **BEST)
    run.train()
    assert run.state.global_step == 5 and run.state.best_global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    run.save_model(tmp_path / "best")
    final = load_file(tmp_path / "best" / "adapter_model.safetensors")
    replayed = replay(tmp_path)
    assert all(torch.equal(final[name], saved[name]) for name in saved)
    assert all(torch.equal(replayed.tensors[name], saved[name]) for name in saved)
    assert [step.back_to for step in read(tmp_path / NAME).steps] == [None] * 5 + [2]


def test_a_best_model_run_goes_on_from_the_best(tmp_path, monkeypatch):
    script_evaluations(monkeypatch, loss=[3.0, 5.0, 6.0, 7.0, 1.0])
    trainer(tmp_path, max_steps=3, **BEST).train()
    before = (tmp_path / NAME).read_bytes()
    at_end = trainer(tmp_path, max_steps=3, **BEST)
    at_end.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # nothing is left to do
    assert (tmp_path / NAME).read_bytes() == before
    assert torch.equal(at_end.model.base_model.theta(), flat(replay(tmp_path, 1)))
    longer = trainer(tmp_path, max_steps=5, **BEST)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    steps = read(tmp_path / NAME).steps
    assert [step.back_to for step in steps] == [None] * 3 + [1, None]
    assert steps[-1].lr == longer.zeroth_order.param_groups[0]["initial_lr"] * longer.lr_scheduler.lr_lambdas[0](4)
    assert torch.equal(longer.model.base_model.theta(), flat(replay(tmp_path)))


def flat(replayed):
    return replayed.trainable.tensors[0]


def test_the_best_model_without_a_journal_is_the_checkpoint(tmp_path, monkeypatch):
    script_evaluations(monkeypatch, loss=[3.0, 5.0])
    run = trainer(tmp_path, max_steps=2, **BEST)
    run.journal_wanted = False
    run.train()
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert torch.equal(torch.cat([saved[name] for name in sites(run)]), run.model.base_model.theta())


def sites(run):
    return [f"base_model.model.{name}.tt_theta" for name, _ in run.zeroth_order.sites]


def test_a_plateau_lowers_the_rate(tmp_path):
    run = trainer(
        tmp_path,
        max_steps=5,
        learning_rate=1e-6,  # next to nothing changes
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"factor": 0.5, "patience": 1},
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    assert [step.lr / 1e-6 for step in read(tmp_path / NAME).steps] == pytest.approx([1, 1, 1, 0.5, 0.5])


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_bf16_rounds_what_runs_and_no_number_that_is_trained(tmp_path, perturb):
    """Also parameters perturbed one by one: autocast keeps no rounded copy of an earlier probe."""
    spreads, losses = [], []
    for bf16 in (False, True):
        model = tiny_llama(1)
        run = trainer(
            tmp_path / str(bf16),
            max_steps=1,
            model=model,
            bf16=bf16,
            zo=ZOConfig(eps=0.05, queries=2, perturb=perturb),
        )
        run.train()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        spreads.append(run.zeroth_order.spread)
        losses.append(run.state.log_history[0]["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert spreads[1] == pytest.approx(spreads[0], rel=0.2)


def test_label_smoothing(tmp_path):
    run = trainer(tmp_path, max_steps=1, zo=ZOConfig(eps=1e-5), label_smoothing_factor=0.3, data=dataset(4))
    run.train()
    batch = lm_batch(4)
    with torch.no_grad():
        model = tiny_adapted()
        expected, plain = Completion(0.3)(model, batch).mean(), lm_loss(model, batch).mean()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    keep = batch["labels"][:, 1:] != -100
    uniform = -(logits.log_softmax(-1).mean(-1)[:, :-1] * keep).sum(1) / keep.sum(1)
    assert float(expected) == pytest.approx(float(0.7 * plain + 0.3 * uniform.mean()), abs=1e-5)
    assert run.state.log_history[0]["loss"] == pytest.approx(float(expected), abs=1e-3)
    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=0.2)
    scored = trainer(tmp_path / "scored", loss=(head := HeadScores()), label_smoothing_factor=0.1)
    assert (scored.loss.label_smoothing, head.label_smoothing) == (0.1, 0.0)
    for loss in (lm_loss, CandidateLikelihood(2)):
        with pytest.raises(ValueError, match="has no label_smoothing"):
            trainer(tmp_path / "refused", loss=loss, label_smoothing_factor=0.1)


def test_data_seed_orders_the_data_and_nothing_else(tmp_path):
    first, second = (trainer(tmp_path / str(n), max_steps=1, data_seed=n) for n in (1, 2))
    first.train(), second.train()
    a, b = (read(tmp_path / str(n) / NAME) for n in (1, 2))
    assert a.header["run_seed"] == b.header["run_seed"] and a.steps[0].loss != b.steps[0].loss


def test_a_checkpoint_without_the_optimizer_is_not_resumed(tmp_path):
    trainer(tmp_path, max_steps=3, save_only_model=True).train()
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(ValueError, match="step 3, but holds no state of the optimizer"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (tmp_path / NAME).read_bytes() == before


def test_a_requested_checkpoint_ends_the_run_and_is_gone_on_from(tmp_path, monkeypatch):
    class Sigterm(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                jit.jit_manager._enable_checkpoint()  # what the signal's handler does, some seconds later

    monkeypatch.setattr("signal.signal", lambda *_: None)
    run = trainer(tmp_path, save_strategy="no", enable_jit_checkpoint=True, callbacks=[Sigterm()])
    jit = next(c for c in run.callback_handler.callbacks if hasattr(c, "jit_manager"))
    run.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    again = trainer(tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=str(folder))
    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    assert torch.equal(again.model.base_model.theta(), whole.model.base_model.theta())


def test_a_model_made_by_a_function_and_an_emptied_cache(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr("adazeta.trainer.clear_device_cache", lambda: emptied.append(1))
    args = TrainingArguments(
        str(tmp_path), max_steps=4, torch_empty_cache_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    run = ZOTrainer(args=args, model_init=lambda: tiny_adapted(), train_dataset=dataset())
    run.train()
    assert len(emptied) == 2 and run.zeroth_order.step_index == 4
    assert torch.equal(run.model.base_model.theta(), flat(replay(tmp_path)))


def test_pushed_to_the_hub(tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def create_repo(self, name, **settings):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, run_as_future=False, **settings):
            names = set(os.listdir(folder_path))
            pushed.append((repo_id, settings["commit_message"], names))
            return type("Job", (), {"done": lambda self: True, "is_done": lambda self: True})()

    if not hasattr(transformers.trainer, "hf_api"):
        pytest.skip("this transformers pushes by functions, not by an HfApi")
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    run = trainer(tmp_path / "tuned", max_steps=3, push_to_hub=True, hub_model_id="tuned")
    run.train()
    run.push_to_hub()
    assert [(repo, message) for repo, message, _ in pushed] == [
        ("me/tuned", "Training in progress, step 3"),
        ("me/tuned", "End of training"),
    ]
    assert all({"adapter_model.safetensors", "adapter_config.json", NAME} <= names for _, _, names in pushed)
