"""Clients fine-tune one model together, and exchange seeds and scalars alone: no text, no weight, no gradient.

    torchrun --nproc-per-node 3 examples/federated.py --model runs/base --data shard-{rank}.jsonl

Every client holds its own file. In each step all of them probe the same directions, which the run seed names, each on
a batch of its own file; what goes over the wire is one loss difference per query and a few counts, and every client
then makes the same update. With ``--noise`` a client clips the differences of each of its examples and adds Gaussian
noise to their sum before it sends them: the others, and whoever gets the model, learn no more than its epsilon allows.

On machines of their own the clients are started by ``torchrun --nnodes``; see docs/private.md.
"""

import argparse
import random
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from adazeta import LabelWords, TTConfig, ZerothOrder
from adazeta.data import read_examples
from adazeta.distributed import Ranks, open_journal
from adazeta.journal import NAME
from adazeta.privacy import PoissonBatches, Privacy

LABELS = {"negative": " negative", "positive": " positive"}


def draw(batch_size: int, examples: int, seed: int):
    """Yield the indices of one random batch after another."""
    chance = random.Random(seed)
    while True:
        yield chance.sample(range(examples), batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model, the same at all clients")
    parser.add_argument("--data", required=True, help="a client's own file; {rank} is its number")
    parser.add_argument("--output", type=Path, default=Path("runs/federated"), help="where rank 0 writes the journal")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="examples of each client in a step")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--noise", type=float, help="private: noise of a client's sums, in units of --clip")
    parser.add_argument("--clip", type=float, default=0.5, help="bound on an example's differences, with --noise")
    parser.add_argument("--delta", type=float, default=1e-5)
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    ranks = Ranks(data=dist.get_world_size())  # every rank has examples of its own
    examples = read_examples(arguments.data.format(rank=ranks.rank), labels=list(LABELS))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="right")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(arguments.model), TTConfig(rank=2, bottleneck=8, init_seed=0)
    )
    privacy = None
    if arguments.noise:
        privacy = Privacy(arguments.clip, arguments.noise, arguments.batch_size, len(examples), arguments.delta)
    optimizer = ZerothOrder(model, lr=arguments.lr, queries=arguments.queries, ranks=ranks, privacy=privacy)
    arguments.output.mkdir(parents=True, exist_ok=True)
    open_journal(optimizer, arguments.output / NAME)

    loss_fn = LabelWords(tokenizer, list(LABELS.values()))
    batches = draw(arguments.batch_size, len(examples), seed=ranks.rank)
    if privacy:
        batches = (rows for _ in range(arguments.steps) for rows in PoissonBatches(privacy))
    for _, rows in zip(range(arguments.steps), batches):
        batch = {}
        if rows:
            texts = [f"Review: {examples[row].text}\nSentiment:" for row in rows]
            labels = torch.tensor([list(LABELS).index(examples[row].label) for row in rows])
            batch = {**tokenizer(texts, padding=True, return_tensors="pt"), "labels": labels}
        optimizer.estimate(loss_fn, batch)
        optimizer.step()

    print(f"client {ranks.rank}: {len(examples)} examples, theta {optimizer.fingerprint()[:16]}", flush=True)
    if privacy:
        print(
            f"client {ranks.rank}: epsilon {privacy.epsilon(arguments.steps):.3g} at delta {privacy.delta:g}",
            flush=True,
        )
    if ranks.rank == 0:
        model.save_pretrained(arguments.output)
        optimizer.journal.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
