"""Losses from hidden states at scored positions, against full logits."""

import pytest
import torch
import torch.nn.functional as F
from families import batch_for, build, row_alone
from tiny import lm_batch, tiny_llama
from transformers import GraniteConfig, GraniteForCausalLM

from adazeta.errors import UserError
from adazeta.evaluate import evaluate
from adazeta.losses import LabelWords, lm_loss
from adazeta.scoring import aligned, scored_logits


class Words:
    """A tokenizer that knows a few words: all that LabelWords asks for."""

    pad_token_id, unk_token_id, unk_token = 0, 1, "<unk>"
    table = {"good": [5], "bad": [9], "very good": [5, 6], "not so bad": [7, 8, 9], "empty": [], "unheard": [7, 1]}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return self.table[text]


def prompts(rows=5, seed=1):
    batch = lm_batch(rows, seed=seed)
    batch["labels"] = torch.arange(rows) % 2
    return batch


def log_probability(model, prompt, word):
    """log p(word | prompt) from the logits of all words at all positions."""
    ids = torch.cat([prompt, torch.tensor(word)])
    logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(word))


@pytest.mark.parametrize("words", [["good", "bad"], ["good", "not so bad"], ["very good", "not so bad", "bad"]])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_label_words_equal_full_logits(words, left):
    model, batch = tiny_llama(), prompts()
    if left:  # move the padding to the left
        for row in range(5):
            length = int(batch["attention_mask"][row].sum())
            for key in ("input_ids", "attention_mask"):
                batch[key][row] = batch[key][row].roll(batch[key].shape[1] - length)
    loss = LabelWords(Words(), words)
    reference = torch.empty(5, len(words))
    for row in range(5):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        for c, word in enumerate(words):
            reference[row, c] = log_probability(model, prompt, Words.table[word])
    scores = loss.scores(model, batch)
    torch.testing.assert_close(scores.log_softmax(1), reference.log_softmax(1), atol=2e-5, rtol=0)
    if loss.rows_per_example > 1:
        torch.testing.assert_close(scores, reference, atol=2e-5, rtol=0)
    expected = F.cross_entropy(reference, batch["labels"], reduction="none")
    torch.testing.assert_close(loss(model, batch), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_lm_loss_equals_the_models_own():
    model, batch = tiny_llama(), lm_batch(6)
    expected = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in range(6)]
    torch.testing.assert_close(lm_loss(model, batch), torch.stack(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_no_full_vocabulary_logits():
    """The head sees 2 words at B positions for label words, and only the scored positions otherwise."""
    model, batch = tiny_llama(), prompts()
    sizes = []
    original = F.linear

    def record(x, weight, bias=None):
        sizes.append((x.numel() // x.shape[-1], weight.shape[0]))
        return original(x, weight, bias)

    torch.nn.functional.linear = record
    try:
        LabelWords(Words(), ["good", "bad"])(model, batch)
        assert sizes[-1] == (5, 2)
        lm = lm_batch(6)
        lm_loss(model, lm)
        assert sizes[-1] == (int((lm["labels"][:, 1:] != -100).sum()), 64)
    finally:
        torch.nn.functional.linear = original
    assert all(width != 64 for _, width in sizes[:-1])


@pytest.mark.parametrize("words", [None, [3, 1]])
@torch.no_grad()
def test_scored_logits_are_the_models_own(words):
    """With what the family does to its logits: Granite divides them. Masks and other columns make no difference."""
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = GraniteForCausalLM(GraniteConfig(**settings, num_attention_heads=4, logits_scaling=8.0)).eval()
    batch = prompts()
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows, columns = torch.tensor([0, 3, 3, 4]), torch.tensor([5, 0, 2, 1])
    chosen = None if words is None else torch.tensor(words)
    got = scored_logits(model, batch, rows, columns, chosen)
    expected = full[rows, columns] if words is None else full[rows, columns][:, words]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    again = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(again, full)  # hooks and the output layer are as before


def test_aligned_moves_left_padding_and_cuts_the_rest():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 0], [0, 7, 8, 9, 0]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, 8, 9, -100]]),
        "other": torch.ones(2, 5),
    }
    got = aligned(batch, "labels")
    assert got["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert got["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert got["labels"].tolist() == [[5, 6, -100], [7, 8, 9]]
    assert got["other"].shape == (2, 5)
    assert aligned({"input_ids": batch["input_ids"]})["input_ids"] is batch["input_ids"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@torch.no_grad()
def test_positions_of_the_batch_stay_with_their_tokens(family, left):
    model = build(family)
    batch = batch_for(model, 4, 7, left=left)
    batch["position_ids"] = 2 * batch["attention_mask"].cumsum(1)  # not those that a model counts itself
    alone = []
    for row in range(4):
        inputs = row_alone(batch, row)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        logits, labels = (logits, labels) if family == "bert" else (logits[:, :-1], labels[:, 1:])
        alone.append(F.cross_entropy(logits[0], labels[0]))
    wider = {name: F.pad(value, (0, 2), value=-100 if name == "labels" else 0) for name, value in batch.items()}
    torch.testing.assert_close(lm_loss(model, wider), torch.stack(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("words", [["good", "bad"], ["good", "very good"]], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, None], ids=["bool", "float32", "no mask"])
@torch.no_grad()
def test_masks_of_any_kind_and_none(words, dtype):
    model, batch, loss = tiny_llama(), prompts(), LabelWords(Words(), words)
    if dtype is None:
        batch = {name: value[:2, :5] if value.ndim == 2 else value[:2] for name, value in batch.items()}
        other = {name: value for name, value in batch.items() if name != "attention_mask"}
    else:
        other = {**batch, "attention_mask": batch["attention_mask"].to(dtype)}
    assert torch.equal(loss(model, other), loss(model, batch))


@torch.no_grad()
@pytest.mark.parametrize("loss, make", [(LabelWords(Words(), ["good", "bad"]), prompts), (lm_loss, lm_batch)])
def test_bfloat16_model_gives_float32_losses_that_tell_probes_apart(loss, make):
    losses = loss(tiny_llama().bfloat16(), make())
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, losses.bfloat16().float())


def test_evaluate_keeps_the_order_of_the_dataset():
    model = tiny_llama()
    batch = prompts(7)
    data = [
        {"input_ids": batch["input_ids"][i][: int(batch["attention_mask"][i].sum())].tolist(), "labels": i % 2}
        for i in range(7)
    ]

    def collate(examples):
        width = max(len(e["input_ids"]) for e in examples)
        ids = torch.tensor([e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples])
        mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([e["labels"] for e in examples])}

    words, done = LabelWords(Words(), ["good", "bad"]), []
    result = evaluate(model, words, data, collate, batch_size=3, progress=done.append)
    with torch.no_grad():
        scores = words.scores(model, collate(data))
    assert result["predictions"] == scores.argmax(1).tolist() and sum(done) == 7
    assert result["loss"] == pytest.approx(float(F.cross_entropy(scores, batch["labels"])), abs=1e-5)
    with pytest.raises(UserError, match="empty"):
        evaluate(model, words, [], collate)


@pytest.mark.parametrize(
    "words, match",
    [
        (["good"], "at least two"),
        (["good", "good"], "differ"),
        (["good", "empty"], "no tokens"),
        (["good", "unheard"], r"does not know the label word 'unheard', it reads <unk>: choose another"),
    ],
)
def test_bad_label_words(words, match):
    with pytest.raises(ValueError, match=match):
        LabelWords(Words(), words)


def test_a_row_without_scored_token():
    batch = lm_batch(2)
    batch["labels"][1] = -100
    with pytest.raises(ValueError, match="at least one label"):
        lm_loss(tiny_llama(), batch)


def test_a_model_without_a_head():
    with pytest.raises(ValueError, match="head"):
        LabelWords(Words(), ["good", "bad"])(tiny_llama().model, prompts())
