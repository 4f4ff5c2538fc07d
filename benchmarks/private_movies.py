"""Accuracy against epsilon: a private linear head on the frozen all-MiniLM-L6-v2, trained on the movie sentences.

    python benchmarks/private_movies.py --output benchmarks/results/local/private_movies.json

The encoder's pooled outputs are computed once (about 5 TFLOP). Then ``ZerothOrder`` trains the head, 770 numbers, once
without privacy and once for each epsilon and seed, by the same steps on Poisson samples. The encoder was trained on
public text; the movie sentences are the private data. Every epsilon is compared with a second accountant of the library
(Renyi differential privacy, a looser bound) and, without subsampling, with the Gaussian mechanism's closed form.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "python")]

from adazeta import ZerothOrder  # noqa: E402
from adazeta.base_models import model_folder  # noqa: E402
from adazeta.data import load_splits  # noqa: E402
from adazeta.privacy import PoissonBatches, Privacy  # noqa: E402
from adazeta.report import machine, table  # noqa: E402

SETTINGS = {"queries": 32, "eps": 0.5, "lr": 1.0, "combine": "mean", "distribution": "rademacher"}
BATCH, STEPS, CLIP, DELTA, SCALE = 256, 100, 20.0, 1e-5, 8.0


def features(folder: Path, examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the encoder's mean-pooled outputs, of length ``SCALE`` each, and the labels (1: positive)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    examples, found = sorted(examples, key=lambda example: len(example.text)), []
    with torch.no_grad():
        for first in range(0, len(examples), 64):
            texts = [example.text for example in examples[first : first + 64]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            found.append((hidden * mask).sum(1) / mask.sum(1))
    labels = torch.tensor([int(example.label == "positive") for example in examples])
    return SCALE * normalize(torch.cat(found)), labels


def losses(head, batch):
    return cross_entropy(head(batch["x"]), batch["y"], reduction="none")


def train(data, privacy: Privacy | None, seed: int) -> torch.nn.Linear:
    """Return a head after ``STEPS`` steps; without ``privacy`` the same steps, neither clipped nor noised."""
    x, y = data
    head = torch.nn.Linear(x.shape[1], 2)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = ZerothOrder(head, run_seed=seed, privacy=privacy, **SETTINGS)
    batches = PoissonBatches(privacy or Privacy(CLIP, 1.0, BATCH, len(y), DELTA))
    while optimizer.step_index < STEPS:
        for rows in batches:
            optimizer.param_groups[0]["lr"] = SETTINGS["lr"] * (1 - optimizer.step_index / STEPS)
            optimizer.estimate(losses, {"x": x[rows], "y": y[rows]} if rows else {})
            optimizer.step()
            if optimizer.step_index == STEPS:
                break
    return head


def accuracy(head, data) -> float:
    with torch.no_grad():
        return float((head(data[0]).argmax(1) == data[1]).float().mean())


def run(train_data, test_data, epsilon: float | None, seed: int) -> dict:
    """Return the accuracy on ``test_data`` after training with one epsilon and seed, and what was spent."""
    torch.set_num_threads(1)
    if epsilon is None:
        return {"accuracy": accuracy(train(train_data, None, seed), test_data)}
    sizes = {"batch_size": BATCH, "examples": len(train_data[1]), "delta": DELTA}
    privacy = Privacy.for_epsilon(epsilon, steps=STEPS, clip=CLIP, **sizes)
    spent = {"epsilon": privacy.epsilon(STEPS), "renyi_epsilon": privacy.renyi_epsilon(STEPS)}
    assert spent["epsilon"] <= epsilon and spent["epsilon"] <= spent["renyi_epsilon"], spent
    noise = {"noise_multiplier": privacy.noise_multiplier}
    return {"accuracy": accuracy(train(train_data, privacy, seed), test_data), **noise, **spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, nargs="*", default=[0.1, 0.5, 2.0], metavar="X")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--features", type=Path, metavar="FILE", help="keep the encoder's outputs here")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    splits = load_splits("movies", labels=["negative", "positive"], say=print)
    if arguments.features and arguments.features.exists():
        encoded = torch.load(arguments.features, weights_only=True)
    else:
        encoded = {name: features(model_folder("minilm", print), splits[name]) for name in ("train", "test")}
        if arguments.features:
            torch.save(encoded, arguments.features)
    train_data, test_data = encoded["train"], encoded["test"]
    start, epsilons = time.monotonic(), [*arguments.epsilon, None]
    cases = [(epsilon, seed) for epsilon in epsilons for seed in range(arguments.seeds)]
    with ProcessPoolExecutor(arguments.workers, get_context("fork")) as pool:
        found = list(pool.map(partial(run, train_data, test_data), *zip(*cases)))
    lines = []
    for epsilon in epsilons:
        own = [result for case, result in zip(cases, found) if case[0] == epsilon]
        lines.append({**own[0], "asked": epsilon, "accuracy": [result["accuracy"] for result in own]})
    shown = [("epsilon asked", "spent", "by Renyi", "noise", "accuracy")]
    for line in lines:
        spread = stdev(line["accuracy"]) if len(line["accuracy"]) > 1 else 0.0
        cells = [f"{line[key]:.3f}" if key in line else "" for key in ("epsilon", "renyi_epsilon", "noise_multiplier")]
        shown.append((f"{line['asked'] or 'none'}", *cells, f"{mean(line['accuracy']):.3f} ± {spread:.3f}"))
    print(table(shown))
    if arguments.output:
        settings = {
            **SETTINGS,
            "steps": STEPS,
            "clip": CLIP,
            "feature_length": SCALE,
            **{"batch_size": BATCH, "examples": len(train_data[1]), "delta": DELTA},
            "test": len(test_data[1]),
        }
        result = {"settings": settings, "runs": lines, "seconds": time.monotonic() - start, "machine": machine()}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
