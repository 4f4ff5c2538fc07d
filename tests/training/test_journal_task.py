"""A journal that serves as adapter brings its task and its dtype, and flags change only what they name."""

from dataclasses import replace

import pytest
import torch
from tiny_run import write_data, write_model

from adazeta import cli
from adazeta.commands.opened import named_task, opened
from adazeta.runs import Classifier
from adazeta.tasks import LabelWordTask

TRAIN = ("--steps", 2, "--batch-size", 8, "--queries", 2, "--rank", 2, "--bottleneck", 8, "--layers", 1, "--threads", 1)
TASK = ("--template", "{text} is", "--label-words", "negative=negative,positive=positive", "--max-tokens", 40)
OWN = LabelWordTask("{text} is", {"negative": " negative", "positive": " positive"}, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model ``base`` and a run ``run`` in bfloat16 with a task of its own."""
    folder = tmp_path_factory.mktemp("journal-task")
    files = ("--model", write_model(folder / "base"), "--data", write_data(folder / "data.jsonl"))
    command = ("train", *files, "--output", folder / "run", "--dtype", "bfloat16", *TRAIN, *TASK)
    assert cli.main([str(argument) for argument in command]) == 0
    return folder


@pytest.mark.parametrize("name", ["base", "run"])
@pytest.mark.parametrize("flags, changed", [((), {}), (("--max-tokens", "50"), {"max_tokens": 50})])
def test_flags_change_what_they_name(folder, name, flags, changed):
    command = ["eval", str(folder / name), "--journal", str(folder / "run"), *flags]
    arguments = cli.build_parser().parse_args(command)
    classifier = opened(arguments, named_task(arguments))
    assert classifier.task == replace(OWN, **changed)
    assert {p.dtype for n, p in classifier.model.named_parameters() if "tt_theta" not in n} == {torch.bfloat16}


def test_a_dtype_that_is_given_counts(folder):
    classifier = Classifier.open(str(folder / "base"), journal=str(folder / "run"), dtype="float32")
    assert classifier.task == OWN
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
