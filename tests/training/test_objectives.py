"""Losses without a gradient: answers that are generated, classes that are predicted, and what a step makes of them."""

import string
import warnings

import pytest
import torch
from families import adapted
from test_metrics import by_definition
from tiny import dense_float64
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adazeta import ZerothOrder
from adazeta.generation import generate_answers, prompts_of
from adazeta.losses import Completion, LabelWords
from adazeta.objectives import ClassObjective, GenerationObjective
from adazeta.planner import Planner
from adazeta.probes import Plan, Probes, evaluate_probes, probing
from adazeta_kernels import derive_seeds, perturb_

EPS, NEW = 0.3, 6
PROMPTS = ["a warm film", "dull", "no one knows why it is so long", "it"]
REFERENCES = ["yes", ["no", "never"], "who", ""]


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each of 61 letters, so that different tokens are different text; the families' 64 in all."""
    letters = string.ascii_letters + " 01234567"
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{letter: i + 3 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def encoded(tokenizer, side: str = "right", **more) -> dict:
    return {
        **tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt"),
        "references": REFERENCES,
        **more,
    }


def letters(prompt: str, completion: str, reference) -> float:
    """A score that tells any two answers apart, and takes note of the prompt and of the reference."""
    return sum(i * ord(c) for i, c in enumerate(prompt + "|" + completion + "|" + str(reference), 1)) / 1e4


def at_probes(model, loss_fn, batch, limit: int) -> torch.Tensor:
    plan = Plan([1, 2, 3], EPS, (1.0, -1.0), 1, len(batch["input_ids"]))
    return evaluate_probes(
        plan,
        batch,
        lambda rows: loss_fn(model, rows),
        tt_model=model.base_model,
        planner=Planner(probes_per_forward=limit),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_padding_and_cache_change_no_answer(family, side, tokenizer):
    """Rows with padding on either side and a cache say what each says alone without one."""
    model, batch = adapted(family), encoded(tokenizer, side)
    together = generate_answers(model, tokenizer, batch, NEW)
    for index, prompt in enumerate(PROMPTS):
        alone = tokenizer([prompt], return_tensors="pt")
        assert generate_answers(model, tokenizer, alone, NEW, use_cache=False) == [together[index]]
    assert len(set(together)) > 1
    assert generate_answers(model, tokenizer, batch, NEW, use_cache=False) == together


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_ends_at_its_own_end_token(family, tokenizer):
    """Where a token that some rows say ends answers, these are cut there and the others go on."""
    model, batch = adapted(family), encoded(tokenizer)
    inner = model.get_base_model()
    inner.generation_config.eos_token_id = None
    ids, mask = prompts_of(model, batch)
    full = inner.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    full = full[:, -NEW:].tolist()

    def cut(end):
        return [row[: row.index(end)] if end in row else row for row in full]

    end = next(token for row in full for token in row if len(set(map(len, cut(token)))) > 1)
    inner.generation_config.eos_token_id = [end, 2]
    expected = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut(end)]
    assert generate_answers(model, tokenizer, batch, NEW) == expected


def test_a_prompt_ends_where_labels_begin(tokenizer):
    """A batch of completions is a batch of prompts; the text of its labels is the reference."""
    model = adapted("llama")
    texts, answers = ["a film", "dull film"], [" yes", " no way"]
    rows = [tokenizer.encode(text + answer) for text, answer in zip(texts, answers)]
    starts = [len(tokenizer.encode(text)) for text in texts]
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([[-100] * s + row[s:] + [-100] * (longest - len(row)) for row, s in zip(rows, starts)]),
    }
    ids, mask = prompts_of(model, batch)
    assert [tokenizer.decode(row[m.bool()]) for row, m in zip(ids, mask)] == texts
    seen = []
    objective = GenerationObjective(tokenizer, lambda *row: seen.append(row) or 0.25, NEW, stands_for=Completion())
    assert objective(model, batch).tolist() == [0.75, 0.75]
    said = generate_answers(model, tokenizer, tokenizer(texts, padding=True, return_tensors="pt"), NEW)
    assert seen == list(zip(texts, said, ["yes", "no way"]))


@pytest.mark.parametrize("family, positions", [("llama", "all"), ("gpt2", "all"), ("t5", "all"), ("llama", "last")])
def test_all_probes_generate_together(family, positions, tokenizer):
    """Losses of six probes in one generation are those of each alone and, densely in float64, of moved numbers."""
    model, batch = adapted(family, positions=positions), encoded(tokenizer)
    objective = GenerationObjective(tokenizer, letters, NEW)
    together, alone = (at_probes(model, objective, batch, limit) for limit in (6, 1))
    assert torch.equal(together, alone)
    assert len(together.unique()) > len(PROMPTS)  # probes differ
    if positions == "last":  # no dense writing of it: what it means is the model's own generation, row by row
        with probing(model.base_model, Probes.of([2], [EPS])):
            said = [generate_answers(model, tokenizer, tokenizer([p], return_tensors="pt"), NEW)[0] for p in PROMPTS]
    else:
        theta = model.base_model.theta().clone()
        perturb_([theta], [2], [EPS])
        dense = dense_float64(model, theta)
        said = generate_answers(dense, tokenizer, batch, NEW, use_cache=False)
    expected = [1 - letters(*row) for row in zip(PROMPTS, said, REFERENCES)]
    torch.testing.assert_close(together[0, 1, 0], torch.tensor(expected))


def test_what_cannot_generate_is_refused(tokenizer):
    batch, last = encoded(tokenizer), {"positions": "last"}
    with pytest.raises(ValueError, match="a masked language model does not generate"):
        generate_answers(adapted("bert"), tokenizer, batch)
    with pytest.raises(ValueError, match="got an encoder-decoder; use positions='all'"):
        generate_answers(adapted("t5", **last), tokenizer, batch)
    with pytest.raises(ValueError, match="got no cache"):
        generate_answers(adapted("llama", **last), tokenizer, batch, use_cache=False)
    model = adapted("llama")
    with pytest.raises(ValueError, match="at least one token"):
        generate_answers(model, tokenizer, {**batch, "attention_mask": torch.zeros_like(batch["input_ids"])})
    with pytest.raises(ValueError, match="4 rows needs as many references, .* got 1"):
        GenerationObjective(tokenizer, "f1")(model, {**batch, "references": ["yes"]})
    with pytest.raises(TypeError, match="must return a number, got None for 'a warm film'"):
        GenerationObjective(tokenizer, lambda *row: None, 2)(model, batch)
    with pytest.raises(ValueError, match="one of f1, exact-match, got 'bleu'"):
        GenerationObjective(tokenizer, "bleu")
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        GenerationObjective(tokenizer, "f1", 0)


@pytest.mark.parametrize("directions", ["batch", "example", 2])
def test_an_estimate_of_generated_answers(directions, tokenizer):
    """References go with their rows, whoever shares a direction, and nothing is warned about."""
    model, wrong = adapted("llama"), []

    def score(prompt, completion, reference):
        if reference != dict(zip(PROMPTS, map(str, REFERENCES)))[prompt]:
            wrong.append((prompt, reference))
        return letters(prompt, completion, reference)

    opt = ZerothOrder(model, eps=EPS, queries=3, directions=directions)
    before = model.base_model.theta().clone()
    batch = encoded(tokenizer, references=[str(reference) for reference in REFERENCES])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = opt.estimate(GenerationObjective(tokenizer, score, NEW), batch)
    assert not wrong and opt.rows == opt.evaluations == 6 * len(PROMPTS)
    assert loss == loss and len(opt._projected[0]) == 3 * {"batch": 1, "example": 4, 2: 2}[directions]
    assert opt.tokens.real <= opt.tokens.processed
    assert torch.equal(model.base_model.theta(), before)
    opt.step()
    assert opt.spread > 0 and not torch.equal(model.base_model.theta(), before)


WORDS = ["n", "p"]


def classes(tokenizer) -> dict:
    return {**tokenizer(PROMPTS, padding=True, return_tensors="pt"), "labels": torch.tensor([1, 0, 0, 0])}


def class_losses(opt, loss_fn, batch) -> torch.Tensor:
    """Return what one estimate makes of a loss: its projected gradients."""
    opt.estimate(loss_fn, batch)
    found = opt._projected[0]
    opt.zero_grad()
    return found


@pytest.mark.parametrize("words", [WORDS, ["on", "no"]])
def test_accuracy_of_classes(words, tokenizer):
    model, batch = adapted("llama"), classes(tokenizer)
    loss = LabelWords(tokenizer, words)
    objective = ClassObjective(loss, "accuracy")
    assert objective.rows_per_example == loss.rows_per_example
    with probing(model.base_model, Probes.of([2], [-EPS])), torch.no_grad():
        predicted = loss.scores(model, batch).argmax(1)
    together, alone = (at_probes(model, objective, batch, limit) for limit in (6, 1))
    assert torch.equal(together, alone)
    assert together[0, 1, 1].tolist() == (predicted != batch["labels"]).float().tolist()
    assert 0 < together.mean() < 1 and len({row.mean().item() for row in together.view(-1, 4)}) > 1


def test_classes_at_copies_of_the_last_token(tokenizer):
    """With positions='last' the losses of one token a probe are those of one row a probe."""
    model, batch = adapted("llama", positions="last"), classes(tokenizer)

    for function in ("accuracy", "f1", letters):
        objective = ClassObjective(LabelWords(tokenizer, WORDS), function, ["bad", "good"], tokenizer)
        results = {}
        for directions in ("batch", 2):
            opt = ZerothOrder(model, eps=EPS, queries=4, directions=directions)
            found = class_losses(opt, objective, batch)
            assert opt.rows < opt.evaluations  # copies were used
            del objective.losses_at_copies
            assert torch.equal(class_losses(opt, objective, batch), found)
            assert found.unique().numel() > 1
            objective.losses_at_copies = objective._at_copies
            results[directions] = found
        assert results["batch"].shape != results[2].shape


def test_f1_is_of_the_rows_of_a_probe(tokenizer):
    model, batch = adapted("llama"), classes(tokenizer)
    loss, labels = LabelWords(tokenizer, WORDS), batch["labels"].tolist()
    objective = ClassObjective(loss, "f1")
    for directions, groups in (("batch", [range(4)]), (2, [range(2), range(2, 4)])):
        found = {}
        for limit in (8, 1):
            opt = ZerothOrder(model, eps=EPS, queries=2, directions=directions, probes_per_forward=limit)
            found[limit] = class_losses(opt, objective, batch)
        assert torch.equal(found[8], found[1])
        seeds = iter(derive_seeds(opt.run_seed, 0, 4))
        expected = []
        for rows in groups:
            for _ in range(2):
                seed, f1 = next(seeds), []
                for sign in (1, -1):
                    with probing(model.base_model, Probes.of([seed], [sign * EPS])), torch.no_grad():
                        predicted = loss.scores(model, batch).argmax(1).tolist()
                    f1.append(by_definition([predicted[i] for i in rows], [labels[i] for i in rows]))
                expected.append((f1[1] - f1[0]) / (2 * EPS))
        assert found[1].tolist() == pytest.approx(expected, abs=1e-5)
        assert any(expected)
    with torch.no_grad():
        value = by_definition(loss.scores(model, batch).argmax(1).tolist(), labels)
    assert objective(model, batch).tolist() == pytest.approx([1 - value] * 4)


def test_scores_that_are_no_numbers_drop_their_query(tokenizer):
    batch = classes(tokenizer)

    class Broken:
        rows_per_example = 1

        def scores(self, model, batch):
            return torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [2.0, 1.0], [0.0, 1.0]])

    assert ClassObjective(Broken(), "accuracy")(None, batch).isnan().tolist() == [False, True, False, False]
    assert ClassObjective(Broken(), "f1")(None, batch).isnan().all()


def test_objectives_of_classes_that_are_refused(tokenizer):
    loss = LabelWords(tokenizer, WORDS)
    with pytest.raises(ValueError, match="accuracy or f1, got 'exact-match'"):
        ClassObjective(loss, "exact-match")
    with pytest.raises(ValueError, match="a loss that scores classes, got Completion"):
        ClassObjective(Completion(), "accuracy")
    with pytest.raises(ValueError, match="needs names and tokenizer"):
        ClassObjective(loss, letters)
