"""MiniLM learns to judge movie sentences: by zeroth-order steps, and by AdamW on the same numbers.

    python benchmarks/minilm.py --output benchmarks/results/minilm/fitted-head-layer-5.json

2,000 sentences to train on, 1,000 to test. A classification head on a mean of the hidden states (--pooling) and the
adapters of --layers train, the head from the logistic regression on the frozen model's features (``--head-start``);
eps and lr of the zeroth-order run are measured (``adazeta calibrate``), or given. AdamW gets as many passes over the
data as --epochs says, in batches of the same size. Both begin with the same numbers.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from calibration_sweep import COMMON, HEAD, PRESET, Bench

from adazeta import ZerothOrder
from adazeta.auto import calibrate
from adazeta.head_start import start_head
from adazeta.options import TRAIN, resolve
from adazeta.progress import progress_bar
from adazeta.report import machine, table


def adamw(bench: Bench, lr: float, epochs: int) -> dict:
    """Train by backpropagation from the same numbers; return accuracy and loss on the test rows, and what it cost."""
    holder = ZerothOrder(bench.classifier.model, **bench.zo)
    for tensor, start in zip(holder.trainable().tensors, bench.start):
        tensor.copy_(start)
    optimizer = torch.optim.AdamW(holder.param_groups[0]["params"], lr=lr, weight_decay=0.0)
    size, began = bench.settings["batch_size"], time.process_time()
    steps = epochs * len(bench.train) // size
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with progress_bar(steps, f"AdamW, lr {lr:g}", "steps") as bar:
        for batch in bench.batches(steps):
            optimizer.zero_grad()
            bench.loss(bench.classifier.model, batch).mean().backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    cost = {"steps": steps, "rows": steps * size, "cpu_s": time.process_time() - began}
    return {"lr": lr, **bench.evaluate(), **cost}


def main() -> None:
    """Run both, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--steps", type=int, default=400, help="zeroth-order steps (default: 400)")
    parser.add_argument("--queries", type=int, default=16, help="queries a step (default: 16)")
    parser.add_argument("--epochs", type=int, default=3, help="passes of AdamW over the data (default: 3)")
    parser.add_argument("--adamw-lr", type=float, default=0.01, help="learning rate of AdamW (default: 0.01)")
    parser.add_argument("--layers", default="5", help="blocks with adapters (default: 5, the last)")
    parser.add_argument("--sites", default="paper", help="where in a block (default: paper)")
    parser.add_argument("--pooling", default="mean", choices=("mean", "attention"), help="(default: mean)")
    parser.add_argument("--depth", default="all", help="blocks that run: a number, auto or all (default: all)")
    parser.add_argument("--act", default="identity", help="activation of the adapters (default: identity)")
    parser.add_argument("--batch-size", type=int, default=16, help="sentences of a step (default: 16)")
    parser.add_argument("--eps", type=float, help="instead of the calibrated one")
    parser.add_argument("--lr", type=float, help="instead of the calibrated one")
    parser.add_argument("--head-start", default="fitted", choices=("fitted", "random"), help="(default: fitted)")
    parser.add_argument("--train", type=int, default=2000, help="training sentences (default: 2000)")
    parser.add_argument("--test", type=int, default=1000, help="held-out sentences (default: 1000)")
    arguments = parser.parse_args()
    flags = {**COMMON, **HEAD, "dtype": "float32", "steps": arguments.steps, "queries": arguments.queries}
    names = ("layers", "sites", "head_start", "pooling", "act", "batch_size")
    flags |= {name: getattr(arguments, name) for name in names}
    flags["depth"] = None if arguments.depth == "all" else arguments.depth
    bench = Bench(resolve(flags, TRAIN, preset=PRESET), arguments.train, arguments.test)
    result = {"settings": flags, "train": len(bench.train), "test": len(bench.test), "numbers": bench.numbers}
    result |= {"machine": machine(), "random_head": bench.evaluate()}
    start_head(bench.classifier, bench.examples, bench.settings, print)
    bench.start = [tensor.clone() for tensor in ZerothOrder(bench.classifier.model, **bench.zo).trainable().tensors]
    result["before"] = bench.evaluate()
    found = calibrate(bench.classifier, bench.examples, {**bench.settings, "eps": "auto", "lr": "auto"}, PRESET)
    result["calibration"] = found.to_dict()
    result["zeroth_order"] = bench.fit(arguments.eps or found.eps, arguments.lr or found.lr)
    result["adamw"] = adamw(bench, arguments.adamw_lr, arguments.epochs)
    result["gap_points"] = 100 * (result["adamw"]["accuracy"] - result["zeroth_order"]["accuracy"])
    lines = [("", "accuracy", "loss", "rows", "CPU seconds")]
    for name in ("random_head", "before", "zeroth_order", "adamw"):
        run = result[name]
        cost = (f"{run['rows']:,}", f"{run['cpu_s']:,.0f}") if "rows" in run else ("", "")
        lines.append((name.replace("_", " "), f"{run['accuracy']:.3f}", f"{run['loss']:.3f}", *cost))
    print(table(lines) + f"\ngap: {result['gap_points']:.1f} points")
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
