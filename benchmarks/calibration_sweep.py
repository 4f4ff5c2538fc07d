"""Compare what ``--eps auto --lr auto`` proposes with a sweep by hand, at equal rows.

    python benchmarks/calibration_sweep.py smollm2/mixed --output benchmarks/results/calibration/smollm2-mixed.json

One pair of model and number format at a time: the model is calibrated, then trained with what was proposed and with
every learning rate and distance of a grid, each time from the same adapter, on the same batches, for the same number of
steps, and measured on the 1,000 held-out movie sentences. The blocks below the adapters run once for all of them.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch

from adazeta import ZerothOrder
from adazeta.auto import calibrate, run_of
from adazeta.evaluate import judge
from adazeta.head_depth import settle_depth
from adazeta.options import TRAIN, resolve
from adazeta.prepare import load_data, new_classifier, settle, zo_config
from adazeta.progress import progress_bar
from adazeta.report import machine

COMMON = {"prefix_cache": "memory:4GiB", "queries": 4, "seed": 0, "gemm": "plain", "threads": 1}
HEAD = {"model": "minilm", "task": "head", "pooling": "mean", "layers": "5", "head_start": "random", "steps": 100}
CAUSAL = {"model": "smollm2", "layers": "28-29", "steps": 100}
PAIRS = {
    "minilm/float32": {**HEAD, "dtype": "float32"},
    "minilm/mixed": {**HEAD, "dtype": "mixed"},
    "smollm2/float32": {**CAUSAL, "dtype": "float32"},
    "smollm2/mixed": {**CAUSAL, "dtype": "mixed"},
    "smollm2/bfloat16": {**CAUSAL, "dtype": "bfloat16"},
}
PRESET = "default"


class Bench:
    """A pair's model, data and batches, and the numbers that every run begins with."""

    def __init__(self, settings: dict, train: int, test: int):
        splits, self.settings = load_data(settle(settings, print), print)
        torch.set_num_threads(self.settings["threads"])
        self.examples = splits["train"][:train]
        self.settings = settle_depth(self.settings, self.examples, PRESET, print)
        self.classifier = new_classifier(self.settings, PRESET, print)
        self.loss, self.collate = self.classifier.loss(), self.classifier.collator()
        self.train = self.classifier.encode(self.examples)
        self.test = self.classifier.encode(splits["test"][:test]).by_length()
        self.run = run_of(self.settings, PRESET, len(self.train))
        self.zo = vars(zo_config(self.settings, PRESET))
        first = ZerothOrder(self.classifier.model, **self.zo)
        self.prefix = first.prefix
        self.start = [tensor.clone() for tensor in first.trainable().tensors]
        self.numbers = first.trainable().numel

    def batches(self, steps: int):
        """Yield a batch for every step: shuffled epochs, drawn by the seed."""
        draw, order, size = random.Random(self.settings["seed"]), [], self.settings["batch_size"]
        for _ in range(steps):
            if len(order) < size:
                order = draw.sample(range(len(self.train)), len(self.train))
            chosen, order = order[:size], order[size:]
            yield self.collate([self.train[index] for index in chosen])

    def fit(self, eps: float, lr: float) -> dict:
        """Train from the start; return accuracy and loss on the test rows, and what it cost."""
        optimizer = ZerothOrder(self.classifier.model, lr=lr, **{**self.zo, "eps": eps, "on_divergence": "ignore"})
        optimizer.prefix = self.prefix
        for tensor, start in zip(optimizer.trainable().tensors, self.start):
            tensor.copy_(start)
        began, losses = time.process_time(), []
        with progress_bar(len(self.run.factors), f"eps {eps:g}, lr {lr:g}", "steps") as bar:
            for factor, batch in zip(self.run.factors, self.batches(len(self.run.factors))):
                optimizer.param_groups[0]["lr"] = lr * factor
                losses.append(optimizer.estimate(self.loss, batch))
                optimizer.step()
                bar.update(1)
        found = {"eps": eps, "lr": lr, **self.evaluate(), "train_loss": sum(losses[-10:]) / len(losses[-10:])}
        found |= {"rows": optimizer.rows, "losses": optimizer.evaluations, "cpu_s": time.process_time() - began}
        print(json.dumps(found), flush=True)
        return found

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Return accuracy and mean loss on the test rows."""
        right = total = 0.0
        for first in range(0, len(self.test), 32):
            rows = [self.test[index] for index in range(first, min(first + 32, len(self.test)))]
            with self.prefix.shared():
                losses, scores, labels = judge(self.loss, self.classifier.model, self.collate(rows))
            right += float((scores.argmax(-1) == labels).sum())
            total += float(losses.double().sum())
        return {"accuracy": right / len(self.test), "loss": total / len(self.test)}


def main() -> None:
    """Run one pair and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS, help="model/dtype")
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--eps", default="0.003,0.03", help="distances of the grid (default: 0.003,0.03)")
    parser.add_argument("--lr", default="0.01,0.03,0.1", help="rates of the grid (default: 0.01,0.03,0.1)")
    parser.add_argument("--train", type=int, default=512, help="training sentences (default: 512)")
    parser.add_argument("--test", type=int, default=1000, help="held-out sentences (default: 1000)")
    parser.add_argument("--steps", type=int, help="steps of a run (default: the pair's)")
    arguments = parser.parse_args()
    flags = {**COMMON, **PAIRS[arguments.pair], "eps": "auto", "lr": "auto"}
    if arguments.steps:
        flags["steps"] = arguments.steps
    settings = resolve(flags, TRAIN, preset=PRESET)
    # The numbers before measuring, for what is made once; every run has its own.
    bench = Bench({**settings, "eps": None, "lr": None}, arguments.train, arguments.test)
    result = {"pair": arguments.pair, "settings": flags, "train": len(bench.train), "test": len(bench.test)}
    result |= {"numbers": bench.numbers, "machine": machine(), "before": bench.evaluate()}
    print(result["before"], flush=True)
    began = time.process_time()
    found = calibrate(bench.classifier, bench.examples, {**bench.settings, "eps": "auto", "lr": "auto"}, PRESET)
    result |= {"calibration": found.to_dict(), "calibration_cpu_s": time.process_time() - began, "grid": []}
    print(f"proposed: eps {found.eps:g}, lr {found.lr:g}, snr {found.snr:.3g}, loss {found.predicted:.3f}", flush=True)
    result["auto"] = bench.fit(found.eps, found.lr)
    for lr in map(float, arguments.lr.split(",")):
        for eps in map(float, arguments.eps.split(",")):
            result["grid"].append(bench.fit(eps, lr))
            best = max(result["grid"], key=lambda run: run["accuracy"])
            result["best_minus_auto_points"] = 100 * (best["accuracy"] - result["auto"]["accuracy"])
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
