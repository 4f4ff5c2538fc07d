"""Batches on a device: the host decides from twins on the CPU, and nothing but the losses is read back.

The device is "meta", whose tensors have no numbers: whoever reads one gets an error.
"""

import functools
import threading

import pytest
import torch
from families import build
from peft import get_peft_model
from tiny import lm_batch, tiny_adapted
from torch._subclasses.fake_tensor import FakeTensorMode

from adazeta import TTConfig, probe_tokens, probes
from adazeta.batches import along, host, onto, prefetched, to_device
from adazeta.losses import CandidateLikelihood, LabelWords, MaskedLabelWords, lm_loss
from adazeta.probe_tokens import evaluate_probe_tokens
from adazeta.probes import Plan, evaluate_probes
from adazeta.scoring import trunk_of


class Words:
    pad_token_id, mask_token_id = 0, 3

    def encode(self, text, add_special_tokens):
        return [{"good": 5, "bad": 9}[text]]


def test_twins_go_along_and_are_forgotten_when_the_tensor_is_written_to():
    ids = torch.arange(6).view(2, 3)
    moved = onto(ids, "meta")
    part = along(lambda value: value[:, 1:], moved)
    assert host(moved) is ids and torch.equal(host(part), ids[:, 1:]) and host(ids) is ids
    moved.add_(1)
    with pytest.raises(NotImplementedError, match="meta"):  # no twin any more, and no numbers to copy
        host(moved)
    with pytest.raises(NotImplementedError, match="meta"):
        host(onto(torch.ones(2), "meta"))  # floating numbers are nothing that the host decides by
    assert onto(ids, "cpu") is ids


def of_classes(model, rows=4, tokens=7, left=False):
    batch = lm_batch(rows, tokens)
    ids, mask = batch["input_ids"].clamp(min=4) * batch["attention_mask"], batch["attention_mask"]
    ids[:, 0] = 3  # the mask token
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def of_candidates(model):
    batch = lm_batch(8)
    named = {"input_ids": "input_ids", "attention_mask": "attention_mask", "targets": "labels"}
    return {**{name: batch[key].view(4, 2, -1) for name, key in named.items()}, "labels": torch.arange(4) % 2}


@pytest.mark.parametrize(
    "kind, config, loss, make",
    [
        ("llama", {}, lm_loss, lambda model: lm_batch(4)),
        ("llama", {}, LabelWords(Words(), ["good", "bad"]), of_classes),
        ("llama", {}, LabelWords(Words(), ["good", "bad"]), lambda model: of_classes(model, left=True)),
        ("llama", {"positions": "last"}, LabelWords(Words(), ["good", "bad"]), of_classes),
        ("llama", {}, CandidateLikelihood(2), of_candidates),
        ("roberta", {}, MaskedLabelWords(Words(), ["good", "bad"]), of_classes),
    ],
    ids=["completions", "label words", "padded on the left", "probe tokens", "multiple choice", "masked"],
)
@torch.no_grad()
def test_an_estimate_reads_its_losses_once_and_nothing_else(kind, config, loss, make, monkeypatch):
    model = get_peft_model(build(kind), TTConfig(rank=2, bottleneck=8, **config)).eval()
    batch = make(model)
    if config:  # the model is looked at once
        assert probe_tokens.can_use_probe_tokens(model.base_model, "default", loss, batch)
    model.to("meta")
    tt_model, trunk, shapes = model.base_model, trunk_of(model), []
    forward = trunk.forward

    @functools.wraps(forward)
    def without_numbers(*args, **kwargs):
        # transformers looks into masks and positions, for which a tensor of no numbers must say that it is one.
        with FakeTensorMode(allow_non_fake_inputs=True):
            return forward(*args, **kwargs)

    def read(losses):
        shapes.append(len(torch.cat(losses)))
        return torch.rand(shapes[-1]) if config.get("positions") != "last" else torch.rand(4, 6)

    monkeypatch.setattr(trunk, "forward", without_numbers)
    monkeypatch.setattr(probes, "read", read)
    plan = Plan([1, 2, 3], 0.1, (1.0, -1.0), 1, 4)
    moved = to_device(batch, "meta")
    if config:
        assert probe_tokens.can_use_probe_tokens(tt_model, "default", loss, moved)
        losses, _ = evaluate_probe_tokens(plan, moved, model, loss, tt_model=tt_model, adapter="default")
    else:
        losses = evaluate_probes(plan, moved, lambda part: loss(model, part), tt_model=tt_model)
    assert losses.shape == (1, 3, 2, 4) and shapes == [4 if config else 24]


def test_the_next_batch_is_made_while_this_one_is_used():
    used, made = threading.Event(), threading.Event()

    def batches():
        yield {"x": torch.zeros(2, dtype=torch.long), "text": ["a", "b"]}
        assert used.wait(10)
        made.set()
        yield {"x": torch.ones(2, dtype=torch.long), "text": ["c", "d"]}
        raise KeyError("the source fails")

    seen = prefetched(batches(), "meta")
    first = next(seen)
    used.set()
    assert made.wait(10)  # though nobody has asked for the second one
    second = next(seen)
    assert [host(batch["x"]).tolist() for batch in (first, second)] == [[0, 0], [1, 1]]
    assert first["x"].device.type == "meta" and second["text"] == ["c", "d"]
    with pytest.raises(KeyError, match="the source fails"):
        next(seen)
    assert list(prefetched([], "cpu")) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
def test_copies_to_a_gpu_come_from_pinned_memory_before_they_are_used():
    batches = [{"ids": torch.full((64, 64), number), "x": torch.full((1 << 20,), float(number))} for number in range(8)]
    for number, batch in enumerate(prefetched(batches, "cuda")):
        assert batch["ids"].is_cuda and host(batch["ids"]) is batches[number]["ids"]
        assert bool((batch["x"] == number).all()) and bool((batch["ids"] == number).all())


def test_on_the_cpu_a_batch_is_what_it_is():
    model, batch = tiny_adapted(), lm_batch(3)
    assert all(moved is batch[name] for name, moved in to_device(batch, "cpu").items())
    assert all(made is batch[name] for name, made in next(prefetched([batch], "cpu")).items())
    assert torch.equal(lm_loss(model, batch), lm_loss(model, to_device(batch, "cpu")))
