"""Work that a step need not do: padding."""

import tempfile

import pytest
import torch
from step_engines import LITTLE_ADAPTER, Ours
from step_models import build
from timing import SMALL, machine
from transformers import AutoTokenizer, TrainingArguments

from adazeta import ZOTrainer
from adazeta.assets import MODEL, MOVIES, cache_dir
from adazeta.data import MOVIE_LABELS, Example, Prompts, RightPad, load_splits
from adazeta.tasks import LabelWordTask


def movie_prompts() -> Prompts:
    """Return the demo's training prompts as token ids; for a trial run a few made-up ones."""
    if SMALL:
        lengths = torch.randint(5, 40, (200,), generator=torch.Generator().manual_seed(0)).tolist()
        return Prompts([[1] * n for n in lengths], [0] * len(lengths))
    missing = [asset.name for asset in (MODEL, MOVIES) if not (cache_dir() / asset.name).is_dir()]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not in {cache_dir()}: run `adazeta fetch` first")
    examples: list[Example] = load_splits("movies", labels=MOVIE_LABELS)["train"]
    return LabelWordTask().encode(AutoTokenizer.from_pretrained(cache_dir() / MODEL.name), examples)


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def bench_padding(benchmark, strategy):
    """Tokens that pass the model in an epoch of the movie sentences, in batches of 16, over those that are real."""
    prompts = movie_prompts()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            train_sampling_strategy=strategy,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
        )
        model = Ours(build("llama-12l", torch.float32, little=True), 1, folder, LITTLE_ADAPTER).model
        trainer = ZOTrainer(model=model, args=arguments, train_dataset=prompts, data_collator=RightPad(0))
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    processed, real = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    benchmark.extra_info.update(
        **machine(), op="padding", case=f"{strategy}, 16 a batch", processed=processed, real=real, over=processed / real
    )
    benchmark.pedantic(lambda: None, rounds=1)
