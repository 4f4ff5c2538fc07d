"""Label words, candidates and heads in every kind of model, against the model's own logits of each row alone."""

import pytest
import torch
import torch.nn.functional as F
from families import MASKED, adapted, row_alone
from transformers import AutoModelForSequenceClassification

from adazeta import ZerothOrder
from adazeta.losses import (
    CandidateLikelihood,
    HeadScores,
    LabelWords,
    MaskedLabelWords,
    Seq2SeqLabelWords,
    label_words,
    lm_loss,
)

MASK = 3


class Words:
    """A tokenizer that knows a few words: all that the losses ask for."""

    pad_token_id, mask_token_id = 0, MASK
    table = {"good": [5], "bad": [9], "very bad": [4, 9], "not so good": [7, 8, 5], "<extra_id_0>": [63]}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return self.table[text]


def prompts(rows=5, tokens=7, left=False):
    """Prompts with padding and one mask token each; classes 0 and 1."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(10, 60, (rows, tokens), generator=g)
    lengths = torch.tensor([tokens - i % 3 for i in range(rows)])
    ids[torch.arange(rows), torch.arange(rows) % 3] = MASK
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if left:
        shift = (torch.arange(tokens) - (tokens - lengths)[:, None]) % tokens
        batch = {name: value.gather(1, shift) for name, value in batch.items()}
    return {**batch, "labels": torch.arange(rows) % 2}


def rows_of(batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return [row_alone(inputs, row)["input_ids"] for row in range(len(batch["labels"]))]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", MASKED)
@torch.no_grad()
def test_words_at_the_mask(family, left):
    model, batch = adapted(family), prompts(left=left)
    loss = label_words(model, Words(), ["bad", "good"])
    assert isinstance(loss, MaskedLabelWords) and loss.rows_per_example == 1
    expected = torch.cat([model(input_ids=ids).logits[0, ids[0] == MASK][:, [9, 5]] for ids in rows_of(batch)])
    torch.testing.assert_close(loss.scores(model, batch), expected, atol=5e-6, rtol=0)
    expected = F.cross_entropy(expected, batch["labels"], reduction="none")
    torch.testing.assert_close(loss(model, batch), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("prefix", ["", "<extra_id_0>"])
@pytest.mark.parametrize("words", [["bad", "good"], ["bad", "not so good", "very bad"]])
@torch.no_grad()
def test_words_as_the_decoders_answer(words, prefix):
    model, batch = adapted("t5"), prompts(left=True)
    loss = label_words(model, Words(), words, prefix)
    assert isinstance(loss, Seq2SeqLabelWords) and loss.rows_per_example == (1 if len(words) == 2 else 3)
    begin, expected = [0, *([63] if prefix else [])], torch.empty(5, len(words))
    for row, ids in enumerate(rows_of(batch)):
        for c, word in enumerate(words):
            tokens = Words.table[word]
            decoder = torch.tensor([begin + tokens[:-1]])
            log_p = model(input_ids=ids, decoder_input_ids=decoder).logits[0].log_softmax(-1)
            expected[row, c] = sum(log_p[len(begin) - 1 + k, token] for k, token in enumerate(tokens))
    got = loss.scores(model, batch)
    torch.testing.assert_close(got.log_softmax(1), expected.log_softmax(1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("normalize", [False, True])
@torch.no_grad()
def test_candidates_of_each_example(family, normalize):
    """Three examples with 3, 2 and 3 candidates of one to three tokens."""
    model, g = adapted(family), torch.Generator().manual_seed(3)
    answers = [[[5], [6, 7], [8, 9, 10]], [[11, 12], [13]], [[14], [15], [16, 17]]]
    ids = torch.zeros(3, 3, 9, dtype=torch.long)
    mask, targets = ids.clone(), torch.full((3, 3, 9), -100)
    expected = torch.full((3, 3), -torch.inf)
    for b, candidates in enumerate(answers):
        prompt = torch.randint(20, 60, (6 - b,), generator=g)
        for k, candidate in enumerate(candidates):
            answer, n = torch.tensor(candidate), len(prompt)
            if family == "llama":
                row, first = torch.cat((prompt, answer)), n
                log_p = model(input_ids=row[None]).logits[0].log_softmax(-1)[n - 1 : -1]
            else:
                row, first = prompt, 0
                decoder = torch.tensor([[0, *candidate[:-1]]])
                log_p = model(input_ids=row[None], decoder_input_ids=decoder).logits[0].log_softmax(-1)
            ids[b, k, : len(row)], mask[b, k, : len(row)] = row, 1
            targets[b, k, first : first + len(answer)] = answer
            picked = log_p.gather(1, answer[:, None])
            expected[b, k] = picked.mean() if normalize else picked.sum()
    mask[1, 2, 0] = 1  # no candidate, but a row all the same
    loss = CandidateLikelihood(3, normalize)
    batch = {"input_ids": ids, "attention_mask": mask, "targets": targets, "labels": torch.tensor([0, 1, 2])}
    torch.testing.assert_close(loss.scores(model, batch), expected, atol=1e-5, rtol=0)
    losses = loss(model, batch)
    torch.testing.assert_close(losses, F.cross_entropy(expected, batch["labels"], reduction="none"), atol=1e-5, rtol=0)
    opt = ZerothOrder(model, queries=2)
    value = opt.estimate(loss, batch)
    assert value == pytest.approx(float(losses.mean()), abs=0.1) and opt.rows == 4 * 9


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", [*MASKED, "gpt2", "llama", "t5"])
@torch.no_grad()
def test_scores_of_a_head(family, left):
    head = {"modules_to_save": ["classification_head"]} if family == "t5" else {"task_type": "SEQ_CLS"}
    model = adapted(family, auto=AutoModelForSequenceClassification, **head)
    batch = prompts(left=left)
    if family == "t5":  # its head reads the state at the last token, which must be the end of the text
        for row, ids in enumerate(batch["input_ids"]):
            batch["input_ids"][row, ids.nonzero().max()] = model.config.eos_token_id
    expected = torch.cat([model(input_ids=ids).logits for ids in rows_of(batch)])
    torch.testing.assert_close(HeadScores().scores(model, batch), expected, atol=5e-6, rtol=0)
    trained = ZerothOrder(model, queries=2)
    assert trained.others and all("modules_to_save" in name for name in trained.others)
    before = {name: p.clone() for name, p in trained.others.items()}
    trained.estimate(HeadScores(), batch)
    assert all(torch.equal(p, before[name]) for name, p in trained.others.items())
    trained.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained.others.items())


def test_what_does_not_fit_is_named():
    llama, bert = adapted("llama"), adapted("bert")
    with pytest.raises(ValueError, match="LabelWords scores the next token of a causal.*got a masked"):
        LabelWords(Words(), ["good", "bad"]).scores(bert, prompts())
    with pytest.raises(ValueError, match="one mask token, got"):
        batch = prompts()
        batch["input_ids"][1] = 20
        MaskedLabelWords(Words(), ["good", "bad"]).scores(bert, batch)
    with pytest.raises(ValueError, match="words of one token"):
        MaskedLabelWords(Words(), ["good", "very bad"])
    words = Words()
    words.mask_token_id = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLabelWords(words, ["good", "bad"])
    with pytest.raises(ValueError, match="language-model head, got BertForSequenceClassification"):
        lm_loss(adapted("bert", auto=AutoModelForSequenceClassification), prompts())
    labels = torch.full((5, 7), -100)
    with pytest.raises(ValueError, match="at least one label"):
        lm_loss(llama, {**prompts(), "labels": labels.index_fill(1, torch.tensor([0]), 4)})


@pytest.mark.parametrize(
    "family, loss",
    [
        ("bert", MaskedLabelWords(Words(), ["good", "bad"])),
        ("t5", Seq2SeqLabelWords(Words(), ["good", "bad"])),
        ("llama", lm_loss),
        ("llama", CandidateLikelihood(2)),
    ],
)
def test_adapters_on_the_last_token_are_for_causal_label_words(family, loss):
    batch = prompts()
    batch["targets"] = batch["input_ids"][:, None].repeat(1, 2, 1)
    with pytest.raises(ValueError, match="positions='last' act on the last prompt token.*use positions='all'"):
        loss(adapted(family, positions="last"), batch)
