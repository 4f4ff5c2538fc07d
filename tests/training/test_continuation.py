"""The tokens of a label word or an answer behind a prompt, for the ways in which tokenizers treat spaces."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adazeta.continuation import continuation
from adazeta.tasks.answers import answer_tokens

WORDS = ["▁", "▁positive", "▁not", "▁so", "▁good", "▁x", "▁Review:", "x", "g", "o", "d"]


def tokenizer(kind):
    """A tokenizer that puts a space before its text: in the normaliser (Llama 2's), or before words (T5's)."""
    if kind == "bytes":
        found = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("Ġxgodpsitven:Rw")}, merges=[]))
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        found = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -float(len(WORDS))) for word in WORDS)], unk_id=0))
        found.decoder = decoders.Metaspace()
    if kind == "normalizer":
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "words":
        found.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>" if kind != "bytes" else None)


@pytest.mark.parametrize("kind", ["normalizer", "words"])
@pytest.mark.parametrize("text, words", [(" positive", ["▁positive"]), (" not so good", ["▁not", "▁so", "▁good"])])
def test_one_space_is_one_space(kind, text, words):
    found = tokenizer(kind)
    assert found.convert_ids_to_tokens(continuation(found, text)) == words
    prompt = found.encode("Review: good", add_special_tokens=False)
    assert prompt + continuation(found, text) == found.encode(f"Review: good{text}", add_special_tokens=False)
    assert answer_tokens(found, "{text}", text[1:]) == continuation(found, text)


def test_the_normaliser_would_make_two_of_it():
    found = tokenizer("normalizer")
    assert found.tokenize(" positive") == ["▁", "▁positive"]


def test_bytes_and_text_without_a_space_are_as_they_were():
    found = tokenizer("bytes")
    assert continuation(found, " good") == found.encode(" good", add_special_tokens=False)
    for kind in ("normalizer", "words", "bytes"):
        found = tokenizer(kind)
        assert continuation(found, "good") == found.encode("good", add_special_tokens=False)
