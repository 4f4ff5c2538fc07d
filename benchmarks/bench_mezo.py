"""What a MeZO step over all parameters gains when its loops over the parameters become calls of `perturb_`.

    python benchmarks/bench_mezo.py [--model NAME ...] [--rows 4] [--tokens 32] [--json FILE] [--page docs/kernels.md]

The two steps of `baselines/mezo.py` take turns on a model with random weights; medians are compared. "perturbing" is a
step without its two forwards, "step" has them. ADAZETA_BENCH_ROUNDS sets the rounds, `--little` takes a tiny model of
the family. With `--page` the table between `<!-- mezo -->` and `<!-- end mezo -->` is written anew.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path

import torch
from baselines.mezo import perturb_step, plain_step
from step_models import MODELS, build
from timing import machine, paired_seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADINGS = ("model", "dtype", "threads", "rows x tokens", "perturbing", "step", "perturbing, of the plain step")
STEP = {"lr": 1e-7, "eps": 1e-3, "seed": 1}


def language_model_loss(model, batch):
    logits = model(batch).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def measure(name: str, dtype: str, rows: int, tokens: int, device: str, little: bool) -> dict:
    """Return seconds of both steps, with forwards and without, and the two ratios."""
    model = build(name, DTYPES[dtype], device, little).requires_grad_(True)
    batch = torch.randint(16, model.config.vocab_size, (rows, tokens), device=device)

    def no_loss(model, batch):
        return torch.zeros(())

    seconds = paired_seconds(
        {
            f"{way}_{part}": partial(step, model, loss, batch, **STEP)
            for part, loss in (("perturbing", no_loss), ("step", language_model_loss))
            for way, step in (("plain", plain_step), ("kernel", perturb_step))
        },
        on_gpu=device != "cpu",
    )
    return {
        "model": name,
        "dtype": dtype,
        "rows": rows,
        "tokens": tokens,
        **machine(),
        **{f"{key}_ms": 1e3 * value for key, value in seconds.items()},
        "times_perturbing": seconds["plain_perturbing"] / seconds["kernel_perturbing"],
        "times_step": seconds["plain_step"] / seconds["kernel_step"],
        "share": seconds["plain_perturbing"] / seconds["plain_step"],
    }


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table of ratios."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "| " + " | ".join("---" for _ in HEADINGS) + " |"]
    for r in results:
        gains = f"{r['times_perturbing']:.1f}x | {r['times_step']:.2f}x | {100 * r['share']:.0f} %"
        lines.append(f"| {r['model']} | {r['dtype']} | {r['threads']} | {r['rows']} x {r['tokens']} | {gains} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["opt-125m", "roberta-large"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--little", action="store_true", help="tiny models of the families: a trial run")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--page", help="write the table into this page")
    arguments = parser.parse_args()
    shape = (arguments.rows, arguments.tokens, arguments.device, arguments.little)
    results = [measure(name, dtype, *shape) for name in arguments.model for dtype in arguments.dtype]
    print(table(results))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2))
    if arguments.page:
        page = Path(arguments.page)
        new = f"<!-- mezo -->\n{table(results)}\n<!-- end mezo -->"
        page.write_text(re.sub("<!-- mezo -->.*<!-- end mezo -->", new, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
