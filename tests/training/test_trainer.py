"""``ZOTrainer``: Trainer's own loop, resume bit for bit, no backward, logs, callbacks, NaN in the base model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_prefix import LABEL_WORDS
from tiny import lm_batch, tiny_adapted
from transformers import TrainerCallback, TrainingArguments

from adazeta import AdaptiveQueries, UserError, ZOConfig, ZOTrainer
from adazeta.grouped import LengthGrouped
from adazeta.journal import NAME, steps
from adazeta.replay import replay


def dataset(n=20):
    batch = lm_batch(n)
    return [{k: v[i] for k, v in batch.items()} for i in range(n)]


def trainer(folder, max_steps=6, zo=None, model=None, data=None, loss=None, callbacks=(), ranks=None, **args):
    settings = {
        "output_dir": str(folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **args,
    }
    return ZOTrainer(
        model=tiny_adapted() if model is None else model,
        args=TrainingArguments(**settings),
        zo=zo or ZOConfig(eps=0.05, queries=2, momentum=0.9),
        loss=loss,
        train_dataset=data or dataset(),
        eval_dataset=dataset(8),
        callbacks=list(callbacks),
        ranks=ranks,
    )


def test_trains_logs_and_saves_without_a_backward(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("backward was called")

    monkeypatch.setattr(torch.Tensor, "backward", never)
    monkeypatch.setattr(torch.autograd, "backward", never)
    run = trainer(tmp_path)
    before = run.model.base_model.theta().clone()
    run.train()
    assert not torch.equal(run.model.base_model.theta(), before)
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["rows"] for entry in logs] == [16 * k for k in range(1, 7)]
    assert all(entry["zo/queries"] == 2 and entry["zo/dropped"] == 0 and entry["rows_per_second"] > 0 for entry in logs)
    assert all(3 < entry["loss"] < 6 and "grad_norm" not in entry for entry in logs)
    run.save_model(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, replay(tmp_path).tensors[name]) for name, value in saved.items())


def test_resume_is_bit_identical_to_no_interruption(tmp_path):
    whole = trainer(tmp_path / "whole", lr_scheduler_type="cosine")
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    first = trainer(tmp_path / "cut", lr_scheduler_type="cosine", callbacks=[Stop()])
    first.train()
    second = trainer(tmp_path / "cut", lr_scheduler_type="cosine")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert torch.equal(whole.model.base_model.theta(), second.model.base_model.theta())
    assert (tmp_path / "whole" / NAME).read_bytes() == (tmp_path / "cut" / NAME).read_bytes()
    assert second.state.log_history[-2]["rows"] == whole.state.log_history[-2]["rows"]


def test_a_resumed_run_takes_the_settings_it_is_given(tmp_path):
    trainer(tmp_path / "whole", lr_scheduler_type="cosine").train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer(tmp_path / "cut", lr_scheduler_type="cosine", callbacks=[Stop()]).train()
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    zo = ZOConfig(eps=0.05, queries=2, momentum=0.5)
    again = trainer(tmp_path / "cut", lr_scheduler_type="cosine", learning_rate=0.05, weight_decay=0.2, zo=zo)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    before, after = list(steps(tmp_path / "whole" / NAME)), list(steps(tmp_path / "cut" / NAME))
    assert [s.lr for s in after[:3]] == [s.lr for s in before[:3]]
    assert [s.lr for s in after[3:]] == pytest.approx([s.lr / 2 for s in before[3:]], rel=1e-12)
    assert [(s.momentum, s.weight_decay) for s in after] == [(0.9, 0.0)] * 3 + [(0.5, 0.2)] * 3
    logs = [entry["learning_rate"] for entry in again.state.log_history if "loss" in entry]
    assert logs[3:] == [s.lr for s in after[3:]]
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 0.05, "max_steps": 8}
    for name, checkpoint in (("cut", "checkpoint-3"), ("again", None)):
        shutil.copytree(tmp_path / "again", tmp_path / f"{name}-on")
        again = trainer(tmp_path / f"{name}-on", **settings)
        again.journal_wanted = "resume"
        again.train(resume_from_checkpoint=checkpoint and str(tmp_path / f"{name}-on" / checkpoint))
    after = list(steps(tmp_path / "cut-on" / NAME))
    assert [s.lr for s in after[3:]] == [0.05 * ((8 - k) / 6) for k in range(3, 8)]
    assert (tmp_path / "cut-on" / NAME).read_bytes() == (tmp_path / "again-on" / NAME).read_bytes()


def test_a_run_resumed_at_its_last_step_makes_no_more(tmp_path):
    first = trainer(tmp_path)
    first.train()
    before = (tmp_path / NAME).read_bytes()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.zeroth_order.step_index == again.state.global_step == 6
    assert (tmp_path / NAME).read_bytes() == before
    assert torch.equal(first.model.base_model.theta(), again.model.base_model.theta())


def test_gradient_accumulation_uses_every_micro_batch(tmp_path):
    run = trainer(
        tmp_path, max_steps=2, gradient_accumulation_steps=2, zo=ZOConfig(eps=0.05, queries=3, directions="example")
    )
    run.train()
    assert run.zeroth_order.step_index == 2 and run.zeroth_order.rows == 2 * 2 * 4 * 3 * 2
    assert all(len(s.coefficients) == 2 * 4 * 3 and all(s.coefficients) for s in steps(tmp_path / NAME))
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert all(3 < loss < 6 for loss in losses)


def test_paper_schedule_counts_epochs_of_the_data(tmp_path):
    run = trainer(tmp_path, max_steps=12, zo=ZOConfig(eps=0.05, queries=AdaptiveQueries(1, 1, 3)))
    run.train()  # 20 examples in batches of 4: 5 steps an epoch
    queries = [entry["zo/queries"] for entry in run.state.log_history if "loss" in entry]
    assert queries == [1] * 10 + [2] * 2


def test_evaluation(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    run.train()
    assert [entry["step"] for entry in run.state.log_history if "eval_loss" in entry] == [3, 6]
    with torch.no_grad():
        from adazeta.losses import lm_loss

        expected = float(lm_loss(run.model, lm_batch(8)).mean())
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_evaluation_with_scores_gives_predictions_to_metrics(tmp_path):
    class Scored:
        def __call__(self, model, batch):
            return self.scores(model, batch).logsumexp(1)

        def scores(self, model, batch):
            return model(input_ids=batch["input_ids"]).logits[:, -1, :2]

    batch = lm_batch(8)
    data = [{"input_ids": ids, "labels": torch.tensor(i % 2)} for i, ids in enumerate(batch["input_ids"])]
    run = ZOTrainer(
        model=tiny_adapted(),
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[], disable_tqdm=True, use_cpu=True
        ),
        loss=Scored(),
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
    )
    with torch.no_grad():
        scores = run.model(input_ids=batch["input_ids"]).logits[:, -1, :2]
    expected = float((scores.argmax(1) == torch.arange(8) % 2).float().mean())
    assert run.evaluate()["eval_accuracy"] == pytest.approx(expected)


def test_the_seed_is_honoured(tmp_path):
    thetas = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = trainer(tmp_path / name, max_steps=2, seed=seed)
        run.train()
        thetas.append(run.model.base_model.theta())
    assert torch.equal(thetas[0], thetas[1]) and not torch.equal(thetas[0], thetas[2])


def test_many_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"each of 2 processes .* give ranks=adazeta.distributed.join"):
        trainer(tmp_path)


def test_nan_in_the_base_model_is_named(tmp_path):
    model = tiny_adapted()
    model.base_model.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    run = trainer(tmp_path, model=model)
    before = model.base_model.theta().clone()
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight"):
        run.train()
    assert torch.equal(model.base_model.theta(), before)


def test_trainer_state_is_written_for_others(tmp_path):
    trainer(tmp_path, max_steps=3).train()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["rows"] == 48
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()


def test_resume_finds_the_batches_of_similar_length_again(tmp_path):
    settings = {"train_sampling_strategy": "group_by_length", "max_steps": 8, "remove_unused_columns": False}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / NAME).write_bytes((tmp_path / "whole" / NAME).read_bytes())
    second = trainer(tmp_path / "cut", **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(whole.model.base_model.theta(), second.model.base_model.theta())


@pytest.mark.parametrize("positions", ["all", "last"])
def test_the_second_epoch_skips_the_blocks_below_the_first_adapter(tmp_path, positions):
    """Counted: rows through the MLP of every block, in every epoch."""

    def run(name, **zo):
        model = tiny_adapted(layers=3, noise=0.2, positions=positions, layers_to_transform=[2])
        rows, epochs = [0, 0, 0], []
        for index, block in enumerate(model.base_model.model.model.layers):

            def count(module, args, index=index):
                rows[index] += len(args[0])

            block.mlp.register_forward_pre_hook(count)

        class Epochs(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                epochs.append(list(rows))
                rows[:] = [0, 0, 0]

        settings = {"eps": 0.05, "queries": 2, "directions": "example", **zo}
        data = [{**row, "labels": row["labels"] if positions == "all" else torch.tensor(1)} for row in dataset()]
        loss = None if positions == "all" else LABEL_WORDS
        made = trainer(
            tmp_path / name,
            max_steps=15,
            zo=ZOConfig(**settings),
            model=model,
            data=data,
            loss=loss,
            callbacks=[Epochs()],
        )
        made.train()
        return made, epochs, made.model.base_model.theta().clone()

    made, epochs, theta = run("kept")
    forwards = 20 if positions == "last" else 20 * 4
    look = 12  # rows of the optimizer's first looks at the model, which pass all blocks
    assert [epoch[:2] for epoch in epochs[1:]] == [[0, 0], [0, 0]]
    assert 20 <= epochs[0][0] - look == epochs[0][1] - look <= 24
    assert [epoch[2] for epoch in epochs[1:]] == [forwards, forwards]
    log = made.state.log_history[-2]
    assert (log["prefix_hits"], log["prefix_misses"]) == (40, 20)
    assert log["prefix_bytes"] == 4 * 32 * sum(int(row["attention_mask"].sum()) for row in dataset())
    assert log["tokens"] > log["real_tokens"] > 0
    assert torch.equal(theta, run("thrown away", prefix_cache="memory:0")[2])
    off, epochs, _ = run("off", prefix_cache="off")
    assert all(epoch[0] >= 20 for epoch in epochs) and "prefix_hits" not in off.state.log_history[-2]


def test_nothing_is_kept_when_no_example_comes_again(tmp_path):
    model = tiny_adapted(layers=3, layers_to_transform=[2])
    once = trainer(tmp_path / "once", max_steps=5, model=model)
    assert once.create_optimizer().prefix.cache is None
    again = trainer(tmp_path / "again", max_steps=6, model=model)
    assert again.create_optimizer().prefix.cache is not None
    named = trainer(tmp_path / "named", max_steps=5, model=model, zo=ZOConfig(prefix_cache="memory"))
    assert named.create_optimizer().prefix.cache is not None


def test_padding_is_counted(tmp_path):
    run = trainer(tmp_path, max_steps=5, train_sampling_strategy="group_by_length")
    run.train()
    lengths = [int(row["attention_mask"].sum()) for row in dataset()]
    log = run.state.log_history[-2]
    assert log["real_tokens"] == 4 * sum(lengths)  # two queries, two signs
    batches = list(LengthGrouped(lengths, 4, run.args.seed))
    longest = [max(lengths[i] for i in batches[first : first + 4]) for first in range(0, 20, 4)]
    assert log["tokens"] == 4 * 4 * sum(longest)
    assert log["tokens"] / log["real_tokens"] < 1.1 < 20 * 7 / sum(lengths)


def test_batches_stay_on_the_cpu_until_a_step_moves_them(tmp_path):
    """Then the integers of a batch on a GPU keep a twin on the CPU."""
    made = trainer(tmp_path)
    assert made.get_train_dataloader().device is None
    moved = made._prepare_inputs({"input_ids": torch.ones(1, 2, dtype=torch.int64), "texts": ["a"]})
    assert moved["input_ids"].device == made.args.device and moved["texts"] == ["a"]


def test_predict_takes_data_without_answers(tmp_path):
    run = trainer(tmp_path, max_steps=1, loss=LABEL_WORDS)
    rows = [{**row, "labels": torch.tensor(index % 2)} for index, row in enumerate(dataset(4))]
    with_answers = run.predict(rows)
    alone = run.predict([{name: value for name, value in row.items() if name != "labels"} for row in rows])
    assert (alone.predictions == with_answers.predictions).all() and alone.predictions.shape == (4, 2)
    assert alone.label_ids is None and "test_loss" not in alone.metrics
