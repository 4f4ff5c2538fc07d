"""Work that a step need not do: padding, and blocks below the first adapter in later epochs."""

import copy
import tempfile

import pytest
import torch
from step_engines import ADAPTER, LITTLE_ADAPTER, Ours
from step_models import build, make_batch
from timing import SMALL, machine, paired_seconds
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


def bench_upper_quarter(benchmark, threads):
    """Adapters in the upper quarter of 30 blocks, from the second epoch on, against adapters in all blocks.

    The outputs below the first adapter are kept from the first epoch. The same steps are taken by a twin that keeps
    nothing, whose losses must agree.
    """
    base = build("smollm2-135m", torch.float32, little=SMALL)
    blocks = base.config.num_hidden_layers
    adapter = LITTLE_ADAPTER if SMALL else ADAPTER
    upper = {**adapter, "layers_to_transform": list(range(blocks - blocks // 4, blocks))}
    epoch = [make_batch(base, 8, 6 if SMALL else 32, seed) for seed in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        engines = {"upper": Ours(copy.deepcopy(base), 4, f"{folder}/upper", upper, prefix_cache="memory")}
        gemm = engines["upper"].gemm
        engines["nothing_kept"] = Ours(copy.deepcopy(base), 4, f"{folder}/plain", upper, gemm=gemm, prefix_cache="off")
        engines["all"] = Ours(base, 4, f"{folder}/all", adapter, gemm=gemm)

        def losses(name):
            return torch.tensor([engines[name].step(batch) for batch in epoch], dtype=torch.float64)

        first = {name: losses(name) for name in engines}  # the first epoch fills the cache
        second = {name: losses(name) for name in ("upper", "nothing_kept")}
        apart = max(float((e["upper"] - e["nothing_kept"]).abs().max()) for e in (first, second))
        if not apart <= 1e-6:
            raise AssertionError(f"losses with outputs kept from the first epoch differ by {apart:.2g}")
        seconds = paired_seconds({name: lambda name=name: losses(name) for name in engines}, 2, warm_up=False)
    benchmark.extra_info.update(
        **machine(),
        op="upper_quarter",
        case=f"{blocks - blocks // 4} to {blocks - 1} of {blocks}",
        gemm=gemm,
        apart=apart,
        **{f"{name}_ms": 1e3 * value / len(epoch) for name, value in seconds.items()},
        percent_of_all=100 * seconds["upper"] / seconds["all"],
        percent_of_nothing_kept=100 * seconds["upper"] / seconds["nothing_kept"],
    )
    benchmark.pedantic(lambda: None, rounds=1)
