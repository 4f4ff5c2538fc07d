import copy
from dataclasses import replace

import pytest
import torch
from families import build
from tiny_run import write_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from adazeta.data import Example
from adazeta.errors import UserError
from adazeta.examples import Fields, example_of, read_examples
from adazeta.runs import Classifier
from adazeta.tasks import ChoiceTask, CompletionTask, LabelWordTask, from_dict, to_dict
from adazeta.tasks.choice import right_choice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def with_tokens(tokenizer, *tokens, **special):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_prompt_keeps_other_braces():
    task = LabelWordTask(template='{"x"} {text} {0}?')
    assert task.prompt("a {text} b") == '{"x"} a {text} b {0}?'


def test_labels_and_words_keep_their_order():
    task = LabelWordTask(label_words={"2": " good", "1": " bad"})
    assert (task.labels, task.words) == (("2", "1"), (" good", " bad"))
    assert from_dict(to_dict(task)) == task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "no text"}, "exactly once"),
        ({"template": "{text}{text}"}, "exactly once"),
        ({"label_words": {"good": " good"}}, "at least two"),
        ({"label_words": {"good": " yes", "bad": " yes"}}, "different"),
        ({"label_words": {"good": " yes", "bad": ""}}, "not empty"),
    ],
)
def test_bad_tasks(settings, message):
    with pytest.raises(UserError, match=message):
        LabelWordTask(**settings)


def test_encode_is_the_tokenised_prompt(tokenizer):
    task = LabelWordTask()
    prompts = task.encode(tokenizer, [Example("warm", "positive"), Example("dull film", "negative")])
    assert [row["labels"] for row in prompts] == [1, 0]
    assert tokenizer.decode(prompts[1]["input_ids"]) == "Review: dull film\nSentiment:"


def test_unknown_label_and_empty_dataset(tokenizer):
    with pytest.raises(UserError, match="label 'fine' of 'a film' is not one of 'negative', 'positive'"):
        LabelWordTask().encode(tokenizer, [Example("a film", "fine")])
    with pytest.raises(UserError, match="empty"):
        LabelWordTask().encode(tokenizer, [])


def test_long_texts_lose_their_end_and_the_template_stays(tokenizer):
    task = LabelWordTask(max_tokens=40)
    text = "abcdefghij" * 20
    (ids,) = task.encode_texts(tokenizer, [text])
    prompt = tokenizer.decode(ids)
    assert len(ids) == 40  # one token a byte here, so the fit is exact
    assert prompt == f"Review: {text[:21]}\nSentiment:"
    with pytest.raises(UserError, match="max_tokens = 10 leaves no room"):
        LabelWordTask(max_tokens=10).encode_texts(tokenizer, [text])


def test_more_candidates_than_in_training(folder):
    """The third candidate counts, and the others score as they did."""
    examples = [Example("a film", "yes", ("no", "yes", "maybe")), Example("a book", "0", ("no", "yes"))]
    classifier = Classifier.open(str(folder), task=ChoiceTask(candidates=2))
    rows = classifier.encode(examples)
    assert [len(row["input_ids"]) for row in rows] == [len(row["targets"]) for row in rows] == [3, 3]
    found = classifier.evaluate(examples, batch_size=1)
    assert [len(scores) for scores in found["probabilities"]] == [3, 3]
    assert found["probabilities"][0][2] > 0 == found["probabilities"][1][2]
    classifier.task = replace(classifier.task, candidates=3)
    expected = classifier.evaluate(examples)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    for scores, others in zip(found["probabilities"], expected["probabilities"]):
        assert scores == pytest.approx(others, abs=1e-5)


def test_a_number_of_a_candidate_has_decimal_digits():
    assert right_choice(Example("a film", "1", ("no", "yes"))) == 1
    with pytest.raises(UserError, match="label '²' of 'a film' is neither"):
        right_choice(Example("a film", "²", ("no", "yes", "maybe")))


@pytest.mark.parametrize("seq2seq", [False, True])
def test_one_right_answer_is_a_text_and_several_a_list(tokenizer, seq2seq):
    rows = [{"text": "who?", "label": label} for label in ("me", ["me"], ["me", "you"], "")]
    examples = [example_of(row, "line 1", Fields(answers=True)) for row in rows]
    encoded = CompletionTask().encode(tokenizer, examples, seq2seq=seq2seq)
    assert [row["references"] for row in encoded] == ["me", "me", ["me", "you"], ""]


@pytest.mark.parametrize("label, right", [(1, 1), (1.0, 1), (0, 0), (2, 2), (4, 0), ("4", 0), (["1"], 2)])
def test_a_number_among_candidates_that_are_numbers(label, right):
    """A number is that of a candidate first; a list holds the text of right ones."""
    row = {"text": "2+2=", "choices": ["4", "2", "1", "0"], "label": label}
    example = example_of(row, "line 1", Fields(choices=("choices",)))
    assert (example.choices, right_choice(example)) == (("4", "2", "1", "0"), right)


def test_text_that_is_a_candidate_and_the_number_of_another(tmp_path):
    path, fields = tmp_path / "x.csv", Fields(choices=("choices",))
    path.write_text("text,choices,label\n1+0=,0|1,1\n2+2=,4|2|1|0,4\n2+2=,4|2|1|0,1\n")
    message = "x.csv, line 4: label '1' is a candidate, and also the number from 0 of another, '2': in a .jsonl write 1"
    with pytest.raises(UserError, match=message):
        read_examples(path, fields)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))  # where both mean the same, or one is none
    assert [right_choice(example) for example in read_examples(path, fields)] == [1, 0]


def test_what_stands_for_a_missing_word_in_encoder_decoders(tokenizer):
    """T5's decoder repeats the sentinel; BART's tokenizer has a mask token, which its decoder does not say."""
    task = LabelWordTask("{text} is {mask}.")
    bart = with_tokens(tokenizer, mask_token="<mask>")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(bart), "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes, **heads)).eval()
    classifier = Classifier(model, bart, task, {})
    assert classifier.loss().prefix == []
    (ids,) = task.encode_texts(bart, ["a film"])
    assert ids.count(bart.mask_token_id) == 1
    examples = [Example("a film", "positive"), Example("a book", "negative")]
    assert classifier.evaluate(examples)["loss"] > 0
    t5, model = with_tokens(tokenizer, "<extra_id_0>"), build("t5")
    assert task.loss(model, t5).prefix == [t5.convert_tokens_to_ids("<extra_id_0>")]
    with pytest.raises(UserError, match="neither a mask token nor <extra_id_0>: end the template"):
        task.loss(model, tokenizer)
    assert replace(task, template="{text}").loss(model, tokenizer).prefix == []


def test_a_text_that_holds_the_mask_token(tokenizer):
    masked = with_tokens(tokenizer, mask_token="<mask>")
    task = LabelWordTask("{text} is {mask}.")
    with pytest.raises(UserError, match="'a <mask> film': <mask> stands for the missing word"):
        task.encode(masked, [Example("a film", "positive"), Example("a <mask> film", "positive")])
    assert len(task.encode(masked, [Example("a film", "positive")])) == 1
    assert len(LabelWordTask().encode(masked, [Example("a <mask> film", "positive")])) == 1
