"""Prompts longer than a model's table of positions: cut to it, with a word, in every family that has one."""

import json

import pytest
import torch
from families import FAMILIES, MASKED, build
from tiny_run import GOOD, main, train_command, write_data, write_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from adazeta.errors import UserError
from adazeta.generation import generate_answers
from adazeta.positions import most_positions


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_as_many_as_it_says_and_no_more(family):
    """Positions depend on padding's id in some families, so every token is a real one."""
    model = build(family)
    most = most_positions(model)
    none = {"modernbert", "eurobert"}  # they rotate, as most causal models do
    tables = {*MASKED, "opt", "gpt2", "gpt_bigcode", "gpt_neo", "bart", "mbart"} - none
    assert (most is not None) == (family in tables), most
    if most is None:
        return
    ids = torch.full((1, most), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        longer = torch.full((1, most + 1), 5)
        model(input_ids=longer, attention_mask=torch.ones_like(longer))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model of 48 positions, and data."""
    folder = tmp_path_factory.mktemp("short")
    write_model(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(folder / "base")
    write_data(folder / "data.jsonl")
    return folder


def test_longer_prompts_lose_their_end(world, tmp_path, capsys):
    template = ("--template", "A long review of it: {text} Sentiment:")
    code, out, err = main(capsys, *train_command(world, "run", *template, "--output", tmp_path / "run", "--steps", 1))
    assert code == 0 and "the model has 48 positions: --max-tokens is 48 instead of 256" in err, err
    code, out, err = main(capsys, "predict", tmp_path / "run", "a warm film " * 9)
    assert code == 0 and "1 of 1 prompts are longer than --max-tokens 48" in err and "positive" in out


@pytest.mark.parametrize("task", ["label-words", "completion", "choice"])
def test_answers_need_room_too(world, tmp_path, capsys, task):
    """Words and answers of nine tokens: a space and eight letters."""
    rows = [{"text": f"a {GOOD[i % 4]} film no {i}", "label": ("splendid", "terrible")[i % 2]} for i in range(40)]
    if task == "choice":
        rows = [{**row, "choices": ["splendid", "terrible"]} for row in rows]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--label-words", "splendid=splendid,terrible=terrible") if task == "label-words" else ()
    template = "A review of the film that I saw today: {text} It was"
    command = train_command(world, "run", "--task", task, *words, "--template", template, "--positions", "all")
    code, out, err = main(capsys, *command, "--data", data, "--output", tmp_path / "run", "--steps", 1)
    assert code == 2 and "leaves no room for the text" in err, err
    command = [value if value != template else "The film of today: {text} It was very" for value in command]
    code, out, err = main(capsys, *command, "--data", data, "--output", tmp_path / "run", "--steps", 1)
    assert code == 0 and "--max-tokens is 39 instead of 256" in err, err


def test_a_generated_answer_needs_room(world):
    model = GPT2LMHeadModel.from_pretrained(world / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    ids = torch.full((1, 40), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert isinstance(generate_answers(model, tokenizer, batch, 8), list)
    with pytest.raises(UserError, match="a prompt of 40 tokens and an answer of at most 9 .* 48 positions"):
        generate_answers(model, tokenizer, batch, 9)
