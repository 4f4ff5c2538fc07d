"""A random Llama of two blocks with its own tokenizer, a data file, and the command line, here or in a new process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adazeta import cli

GOOD = ("warm", "funny", "bright", "moving")
BAD = ("dull", "cold", "empty", "tired")

SAME_BITS = ("--threads", 1, "--dtype", "float32", "--gemm", "plain")  # wherever and whenever
ADAPTER = ("--rank", 2, "--bottleneck", 8, "--sites", "mlp")
STEPS = ("--steps", 12, "--save-every", 6, "--batch-size", 8, "--lr", 0.01, "--eps", 0.01, "--queries", 8)
SMALL = (*STEPS, *SAME_BITS, *ADAPTER)
PAPER = ("--preset", "paper", "--queries", "adaptive:0.85,0.45,20", "--sites", "paper")


def write_model(folder: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Write a byte-level random Llama (width 64) and its tokenizer; " positive" and " negative" are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{letter: index + 1 for index, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([" positive", " negative"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=len(vocabulary) + 2, pad_token_id=0, initializer_range=0.2, **{**small, **sizes})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 60) -> Path:
    """Write ``count`` different labelled texts as JSON lines; the label shows in one word."""
    with path.open("w", encoding="utf-8") as stream:
        for index in range(count):
            words, label = ((GOOD, "positive"), (BAD, "negative"))[index % 2]
            row = {"text": f"a {words[index % 4]} film no {index}", "label": label}
            stream.write(json.dumps(row) + "\n")
    return path


def adazeta(
    *arguments, cache: Path | None = None, timeout: float = 300, stdout=subprocess.PIPE, **environment
) -> subprocess.CompletedProcess:
    """Run ``python -m adazeta`` in a new process on one thread; return it with its output as text."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    if cache is not None:
        settings["ADAZETA_CACHE"] = str(cache)
    command = [sys.executable, "-m", "adazeta", *map(str, arguments)]
    return subprocess.run(
        command,
        env={**os.environ, **settings},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )


def train_command(folder, output, *more):
    """Return the arguments that train the model ``base`` on ``data.jsonl`` in ``folder``."""
    data = ("--model", folder / "base", "--data", folder / "data.jsonl", "--output", folder / output)
    return [str(argument) for argument in ("train", *data, *SMALL, *more)]


def main(capsys, *arguments):
    """Run the command in this process; return exit status, stdout and stderr."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def fails(capsys, *arguments):
    """Run a command that must fail in the proper way; return its one-line message."""
    code, out, err = main(capsys, *arguments)
    line = err.strip().splitlines()[-1]
    assert code == 2, (out, err)
    assert line.startswith("adazeta: error: ")
    assert "Traceback" not in err
    return line
