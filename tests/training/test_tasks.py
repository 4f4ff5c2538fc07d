import pytest
from tiny_run import write_model
from transformers import AutoTokenizer

from adazeta.data import Example
from adazeta.errors import UserError
from adazeta.tasks import LabelWordTask, from_dict, to_dict


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("model")))


def test_prompt_keeps_other_braces():
    task = LabelWordTask(template="{x} {text} {0}?")
    assert task.prompt("a {text} b") == "{x} a {text} b {0}?"


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
