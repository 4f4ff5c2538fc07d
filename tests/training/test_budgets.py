"""A memory budget that has to be looked up, with everything else that a run may have at the same time."""

import copy
import logging

import pytest
import torch
from families import FAMILIES, adapted, batch_for
from peft import get_peft_model
from tiny import lm_batch, tiny_adapted, tiny_llama
from transformers import BertConfig, BertModel

from adazeta import LabelWords, TTConfig, ZerothOrder, frozen, memory
from adazeta.errors import SettingError
from adazeta.footprint import LiveBytes, forward_bytes
from adazeta.heads import Pooled
from adazeta.losses import CandidateLikelihood, HeadScores, lm_loss
from adazeta.objectives import ClassObjective
from adazeta.planner import MOST_TOKENS, TOKENS_PER_FORWARD, Planner
from adazeta.probe_tokens import evaluate_probe_tokens
from adazeta.probes import Plan, tokens_of
from adazeta.tokens import looking

LITTLE = 600_000  # bytes: fewer probes than the tokens would allow, more than one
SIGNS = (1.0, -1.0)


class Words:
    pad_token_id = 0

    def encode(self, word, add_special_tokens):
        return [ord(word[-1]) % 40 + 2]


@pytest.mark.parametrize("packed, layers", [(False, None), (True, [1])], ids=["plain-all", "packed-upper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_changes_no_loss_in_any_family(family, packed, layers):
    model = adapted(family, layers_to_transform=layers)
    if packed:
        frozen.pack(model, 64)
    batch = batch_for(model, 4, 7)
    losses, counts = [], []
    little = LITTLE * (2 if family == "qwen3_5_text" else 1)  # linear attention takes tokens in chunks of 64
    for budget in (None, little):
        step = ZerothOrder(model, queries=4, memory_budget=budget)
        losses.append(step.estimate(lm_loss, batch))
        counts.append((step.tokens.processed, step.tokens.real))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert counts[0] == counts[1]  # looking at a forward's memory is no forward


def test_a_budget_of_a_pooled_encoder_and_of_a_model_that_is_no_transformer(caplog):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = BertModel(BertConfig(**sizes, intermediate_size=48))
    head = get_peft_model(Pooled(encoder, 2).eval(), TTConfig(rank=2, bottleneck=8, sites=["output.dense"]))
    batch = {"input_ids": torch.randint(2, 60, (4, 7)), "labels": torch.arange(4) % 2}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    ZerothOrder(head, queries=8, memory_budget=LITTLE).estimate(HeadScores(), batch)
    assert not caplog.records
    images = {"pixels": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 2}
    assert tokens_of(images) == (1, "cpu")
    assert tokens_of({"inputs_embeds": torch.randn(4, 9, 32)}) == (9, "cpu")
    planner = Planner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)), memory_budget=1000)
    with caplog.at_level(logging.WARNING, logger="adazeta"):
        knee = TOKENS_PER_FORWARD["cpu float32"]
        assert [planner.probes(4, tokens) for tokens in (1, 1, 40)] == [knee // 4, knee // 4, knee // 160]
    assert caplog.text.count("is not known beforehand") == 1


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_a_budget_is_one_for_parameters_that_are_no_adapters_too(perturb):
    model, losses = tiny_llama(1), []
    before = [p.clone() for p in model.parameters()]
    for budget in (None, LITTLE):
        losses.append(
            ZerothOrder(model, queries=2, perturb=perturb, memory_budget=budget).estimate(lm_loss, lm_batch())
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    with pytest.raises(SettingError, match="too small for one probe of 4 rows"):
        ZerothOrder(model, queries=2, perturb=perturb, memory_budget=10_000).estimate(lm_loss, lm_batch())
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p, old, atol=1e-6, rtol=0)


def test_no_budget_of_ones_own_never_refuses(monkeypatch):
    monkeypatch.setattr("adazeta.planner.available_bytes", lambda: 0)
    assert Planner(tiny_adapted()).probes(4, 16) == 1


def test_what_the_system_would_give_up_counts_as_free(monkeypatch, tmp_path):
    texts = {"max": "1000000", "current": "999000", "stat": "anon 1000\nactive_file 300000\ninactive_file 500000\n"}
    read = memory.Path.read_text

    def read_text(path, *args, **kwargs):
        name = str(path).removeprefix("/sys/fs/cgroup/memory.")
        return texts[name] if name in texts else read(path, *args, **kwargs)

    monkeypatch.setattr(memory.Path, "read_text", read_text)
    assert memory.available_bytes() == 801_000


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_copies_are_halved_when_one_row_is_too_much(groups, caplog):
    model, loss = tiny_adapted(noise=0.3, positions="last"), LabelWords(Words(), [" a", " b"])
    batch = {**lm_batch(4, 7), "labels": torch.arange(4) % 2}
    plan = Plan(list(range(4 * groups)), 0.1, SIGNS, groups, 4 // groups)
    sizes, tt_model = [], model.base_model

    def losses(most, planner):
        def narrow(model, part, copies):
            sizes.append(part["input_ids"].shape[0] * copies)
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("no room")
            return loss.losses_at_copies(model, part, copies)

        limited = copy.copy(loss)
        limited.losses_at_copies = narrow
        settings = {"tt_model": tt_model, "adapter": "default", "planner": planner}
        return evaluate_probe_tokens(plan, batch, model, limited, **settings)[0]

    expected, planner = losses(1000, Planner()), Planner()
    torch.testing.assert_close(losses(8 // groups - 1, planner), expected, atol=1e-6, rtol=0)
    sizes.clear()
    torch.testing.assert_close(losses(8 // groups - 1, planner), expected, atol=1e-6, rtol=0)
    assert max(sizes) < 8 // groups  # learned
    assert caplog.text.count("out of memory") == 1
    with pytest.raises(torch.OutOfMemoryError):
        losses(0, Planner())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_budget_decides_how_many_copies_there_are(groups):
    model, loss = tiny_adapted(layers=1, noise=0.3, positions="last"), LabelWords(Words(), [" a", " b"])
    batch, losses, shapes = {**lm_batch(4, 7), "labels": torch.arange(4) % 2}, [], []

    def note(module, args, kwargs):
        if not looking.get():
            shapes.append(kwargs["input_ids"].shape)

    for budget in (None, 80_000):
        step = ZerothOrder(model, queries=16, directions=groups, memory_budget=budget)
        losses.append(step.estimate(loss, batch))  # the first one looks at the model too
        step.zero_grad()
        handle = model.get_base_model().model.register_forward_pre_hook(note, with_kwargs=True)
        shapes.clear()
        step.estimate(loss, batch)
        handle.remove()
    taken = max(forward_bytes(model, *shape, tt_model=model.base_model) for shape in shapes)
    assert 0.5 * budget < taken <= budget
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    with pytest.raises(SettingError, match="too small for one probe"):
        ZerothOrder(model, queries=1, directions=groups, memory_budget=10_000).estimate(loss, batch)


class LongWords:
    pad_token_id = 0

    def encode(self, word, add_special_tokens):
        return {"very bad": [4, 9], "so good": [7, 8, 5]}[word]


@pytest.mark.parametrize("objective", [False, True], ids=["loss", "accuracy"])
@pytest.mark.parametrize("kind", ["long words", "candidates"])
def test_all_rows_of_an_example_count(kind, objective):
    """A loss may repeat a prompt for each of its words, and score them with the whole vocabulary."""
    model, batch = get_peft_model(tiny_llama(1, vocab_size=1000), TTConfig(rank=2, bottleneck=8)).eval(), lm_batch(4, 8)
    loss = LabelWords(LongWords(), ["very bad", "so good"])
    if kind == "candidates":
        loss = CandidateLikelihood(3)
        batch = {name: value[:, None].repeat(1, 3, 1) for name, value in batch.items()}
        batch["targets"] = batch.pop("labels")
    batch["labels"], shapes = torch.arange(4) % 2, []
    loss = ClassObjective(loss, "accuracy") if objective else loss
    trunk = model.get_base_model().model
    trunk.register_forward_pre_hook(
        lambda m, args, inputs: shapes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    for budget in (1_000_000, 10**9):
        step = ZerothOrder(model, queries=16, memory_budget=budget)
        step.estimate(loss, batch)  # with a look at the model, and at the memory of its forwards
        step.zero_grad()
        shapes.clear()
        with LiveBytes() as live:
            step.estimate(loss, batch)
        assert 0.3 * 10**6 < live.peak < budget
    assert 400 < max(shapes) <= TOKENS_PER_FORWARD["cpu float32"]


def test_limited_copies_still_share_forwards_between_rows():
    model, loss, seen = tiny_adapted(positions="last"), LabelWords(Words(), [" a", " b"]), []
    batch = {**lm_batch(4, 7), "labels": torch.arange(4) % 2}
    step = ZerothOrder(model, queries=4, probes_per_forward=4)
    model.get_base_model().model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    step.estimate(loss, batch)
    assert seen[-2:] == [(4, 6 + 4)] * 2  # 8 probes in two forwards of all rows


def test_copies_are_no_more_than_a_forward_gains_from(monkeypatch):
    model, loss, seen = tiny_adapted(1, noise=0.3, positions="last"), LabelWords(Words(), [" a", " b"]), []
    batch, losses = {**lm_batch(2, 4), "labels": torch.arange(2)}, []
    model.get_base_model().model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for most in (10**9, 33, 10):  # 3 tokens and 30 copies, and at least 8 x 3 copies
        monkeypatch.setitem(MOST_TOKENS, "cpu float32", most)
        losses.append(ZerothOrder(model, queries=24).estimate(loss, batch))
    assert [shape for shape in seen if shape[0] == 2 and shape[1] > 7] == [(2, 51), (2, 33), (2, 21), (2, 27), (2, 27)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_kept_hidden_states_are_those_of_the_precision():
    model = tiny_adapted(layers=3, noise=0.2, layers_to_transform=[2])
    step = ZerothOrder(model, queries=2, prefix_cache="memory")
    with torch.autocast("cpu", torch.bfloat16):
        step.estimate(lm_loss, lm_batch(4))
    step.zero_grad()
    fresh = ZerothOrder(model, queries=2, prefix_cache="memory")
    assert step.estimate(lm_loss, lm_batch(4)) == fresh.estimate(lm_loss, lm_batch(4))


@pytest.mark.parametrize("change", [frozen.mix, lambda model: frozen.pack(model, 64)], ids=["mix", "pack"])
def test_the_layer_that_t5_asks_for_its_dtype_stays(change):
    model = adapted("t5")
    change(model)
    kinds = {name.split(".")[-1 - name.endswith("base_layer")]: type(m) for name, m in model.named_modules()}
    assert kinds["wo"] is torch.nn.Linear and kinds["wi_0"] in (frozen.MixedLinear, frozen.PackedLinear)


def test_flattened_rows_have_no_last_token():
    model = adapted("opt", positions="last")
    with pytest.raises(ValueError, match="needs rows and tokens apart"):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))


@pytest.mark.parametrize("way", ["streamed", "in-place", "one probe a forward"])
def test_a_probe_of_its_own_forward_passes_in_parts_when_memory_runs_out(way, caplog):
    """Nothing has looked at the rows before: that is done when memory runs out, and nothing is moved for it."""
    found, trained = [], []
    for most in (4, 2):
        model = tiny_adapted(1, noise=0.2) if way == "one probe a forward" else tiny_llama(1)
        more = {"probes_per_forward": 1} if way == "one probe a forward" else {"perturb": way}
        opt, sizes = ZerothOrder(model, queries=2, eps=1e-2, **more), []
        loss = narrow_loss(most, sizes)
        found.append([opt.estimate(loss, lm_batch(4)) for _ in range(2)])
        assert sizes[-4:] == [most] * 4  # the second time without a look, and without trying more
        opt.step()
        trained.append(opt.trainable().tensors)
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    for ours, others in zip(*trained):
        torch.testing.assert_close(ours, others, atol=2e-3, rtol=0)
    assert caplog.text.count("out of memory in a forward of 28 tokens; going on with 14") == 1


def narrow_loss(most, sizes):
    """``lm_loss`` for as many rows as memory has room for; ``sizes`` are those of its calls."""

    def loss(model, batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("no room")
        return lm_loss(model, batch)

    return loss


def test_a_probe_whose_rows_mix_does_not_pass_in_parts():
    def mixed(model, batch):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no room")
        return (loss := lm_loss(model, batch)) + loss.mean()

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        ZerothOrder(tiny_llama(1)).estimate(mixed, lm_batch(4))
