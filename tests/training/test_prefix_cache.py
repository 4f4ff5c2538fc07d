"""What is kept across epochs: the same bits with and without, in memory and on disk, and never of another model."""

import copy
import logging
import os

import pytest
import torch
from tiny import lm_batch, tiny_adapted

from adazeta import ZerothOrder
from adazeta.frozen import pack, unpack
from adazeta.losses import lm_loss
from adazeta.prefix_cache import DiskCache, MemoryCache, read_setting

BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [1, 4, 2, 7], [0, 6, 5, 3], [7, 2], [1, 0, 6]]
ROW = 4 * 32  # bytes of a token


def model_with(positions="all", seed=0, first=2):
    return tiny_adapted(layers=3, seed=seed, noise=0.2, positions=positions, layers_to_transform=list(range(first, 3)))


def train(opt, batches=BATCHES):
    """Steps on parts of eight examples; returns losses and the trained numbers."""
    data = lm_batch(8)
    losses = [0.0] * len(batches)
    for number, rows in enumerate(batches):
        losses[number] = opt.estimate(lm_loss, {name: value[rows] for name, value in data.items()})
        opt.step()
    return losses, opt.fingerprint()


def optimizer(prefix_cache, model=None, **settings):
    return ZerothOrder(model or model_with(), lr=0.05, eps=0.1, queries=3, prefix_cache=prefix_cache, **settings)


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path / "cache"))


def files(tmp_path):
    return sorted(path for path in (tmp_path / "cache" / "prefix").glob("*/*") if path.is_file())


def test_kept_thrown_out_or_read_from_disk_the_bits_are_the_same(tmp_path):
    nothing = optimizer("memory:0")
    expected = train(nothing)
    assert (
        nothing.prefix.hits == 0 and nothing.prefix.misses == sum(map(len, BATCHES)) and nothing.prefix.cache.bytes == 0
    )
    for setting, hits in (("memory", 13), ("auto", 13), (f"memory:{4 * 7 * ROW}", None), ("disk", 13), ("disk", 21)):
        opt = optimizer(setting)
        assert train(opt) == expected
        found = opt.prefix.hits
        assert found == hits if hits is not None else 0 < found < 13
        assert opt.prefix.misses == 21 - found
        assert 0 < opt.prefix.cache.bytes
    assert len(files(tmp_path)) == 8
    off = train(optimizer("off"))
    assert off[0] == pytest.approx(expected[0], abs=1e-5)


def test_a_resumed_run_with_an_empty_cache_has_the_same_bits():
    whole = optimizer("memory")
    expected = train(whole)
    first = optimizer("memory")
    train(first, BATCHES[:3])
    second = optimizer("memory", model=copy.deepcopy(first.model))
    second.load_state_dict(first.state_dict())
    assert train(second, BATCHES[3:])[1] == expected[1]
    assert second.tokens.processed == whole.tokens.processed and second.tokens.real == whole.tokens.real > 0


def change_through_data(model):
    model.base_model.model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)


def change_in_place(model):
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.q_proj.weight[3, 3] += 0.5


def load_other_weights(model):
    other = model_with(seed=1)
    model.base_model.model.model.load_state_dict(other.base_model.model.model.state_dict(), strict=True)


def replace_embeddings(model):
    embeddings = model.get_input_embeddings()
    embeddings.weight = torch.nn.Parameter(embeddings.weight.detach() * 1.1, requires_grad=False)


def cast(model):
    for block in model.base_model.model.model.layers[:2]:
        for parameter in block.parameters():
            parameter.data = parameter.data.bfloat16().float()


def pack_other_weights(model):
    for block in model.base_model.model.model.layers[:2]:
        weight = block.mlp.up_proj.weight * 1.5
        unpack(block.mlp.up_proj)
        block.mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert pack(model.base_model.model, tokens=16) == 2


def scaled(module, args, output):
    return 1.5 * output


def hook(model):
    model.base_model.model.model.layers[0].mlp.register_forward_hook(scaled)


CHANGES = [change_through_data, change_in_place, load_other_weights, replace_embeddings, cast, pack_other_weights, hook]


@pytest.mark.parametrize("setting", ["memory", "disk"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_base_model_gets_nothing_of_the_old_one(change, setting, tmp_path):
    model = model_with()
    if change is pack_other_weights:
        pack(model.base_model.model, tokens=16)
    opt = optimizer(setting, model)
    train(opt, BATCHES[:2])
    change(model)
    fresh = optimizer("memory:0", copy.deepcopy(model))
    fresh.load_state_dict(opt.state_dict())
    assert train(opt, BATCHES[2:4]) == train(fresh, BATCHES[2:4])
    assert opt.prefix.hits == 0 and opt.prefix.misses == 16
    if setting == "disk":
        assert len({path.parent for path in files(tmp_path)}) == 2


def test_another_packing_of_the_same_weights_is_another_model(tmp_path):
    for tokens in (None, 16, 16, 256):  # products of each have bits of their own
        model = model_with()
        if tokens:
            pack(model.base_model.model, tokens=tokens)
        train(optimizer("disk", model), BATCHES[:1])
    assert len({path.parent for path in files(tmp_path)}) == 3


def test_weights_above_the_first_adapter_do_not_matter():
    model = model_with(first=1)
    opt = optimizer("memory", model)
    train(opt, BATCHES[:2])
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    train(opt, BATCHES[:2])
    assert opt.prefix.hits == 8


def test_probe_tokens_find_what_they_kept():
    from test_prefix import LABEL_WORDS

    batch = {**lm_batch(4), "labels": torch.arange(4) % 2}
    losses = {}
    for setting in ("memory", "memory:0"):
        opt = optimizer(setting, model_with("last"), directions="example")
        losses[setting] = [opt.estimate(LABEL_WORDS, batch) for _ in range(3) if not opt.zero_grad()]
    assert losses["memory"] == losses["memory:0"]
    assert len(set(losses["memory"])) == 1


def test_damaged_files_are_computed_again(tmp_path, caplog):
    expected = train(optimizer("disk"))
    damaged = files(tmp_path)
    contents = [path.read_bytes() for path in damaged]
    damaged[0].write_bytes(contents[0][:-7])
    damaged[1].write_bytes(b"")
    damaged[2].write_bytes(contents[2][:100] + bytes([contents[2][100] ^ 1]) + contents[2][101:])
    damaged[3].write_bytes(contents[4])  # whole, but of another example
    damaged[5].write_bytes(contents[5] + b"more")
    opt = optimizer("disk")
    with caplog.at_level(logging.WARNING, logger="adazeta"):
        assert train(opt) == expected
    assert opt.prefix.misses == 5 and "is damaged: computed again" in caplog.text
    assert [path.read_bytes() for path in damaged] == contents  # and stored anew


def test_a_limit_a_full_disk_and_a_forbidden_folder_are_no_errors(tmp_path, caplog, monkeypatch):
    expected = train(optimizer("memory:0"))
    with caplog.at_level(logging.WARNING, logger="adazeta"):
        assert train(optimizer("disk:2KB")) == expected
        assert 0 < sum(path.stat().st_size for path in files(tmp_path)) <= 2000
        assert "the limit of 2,000 bytes is reached" in caplog.text

        def full(path, content):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_bytes", full)
            assert train(optimizer("disk")) == expected
        assert "No space left on device" in caplog.text
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path / "file"))
        assert train(optimizer("disk")) == expected
    assert len([r for r in caplog.records if "nothing more is stored" in r.getMessage()]) == 3
    assert not [path for path in (tmp_path / "cache").rglob(".*")]


def test_other_models_make_room_those_used_longest_ago_first(tmp_path):
    value, root = torch.zeros(100), tmp_path / "models"
    (root / "notes").mkdir(parents=True)
    (root / "notes" / "of somebody").write_text("stays")
    sizes = []
    for age, name in ((20, "a"), (10, "b"), (30, "c")):
        cache = DiskCache(root, 10**6)
        cache.open(lambda name=name: name * 64)
        cache.put(b"key", value)
        sizes.append(cache.bytes)
        now = cache.folder.stat().st_mtime
        os.utime(cache.folder, (now - age, now - age))
    size = sizes[0]
    new = DiskCache(root, 3 * size)
    new.open(lambda: "d" * 64)
    left = []
    for number in range(4):
        new.put(str(number).encode(), value)
        left.append("".join(sorted(path.name[0] for path in root.iterdir())))
    assert left == ["abdn", "bdn", "dn", "dn"] and new.bytes == 3 * size  # the fourth is not stored
    again = DiskCache(root)
    again.open(lambda: "e" * 64)
    assert again.limit > 3 * size and torch.equal(new.get(b"0"), value)


def test_two_processes_may_share_a_folder(tmp_path):
    one, two = DiskCache(tmp_path / "shared", 10**6), DiskCache(tmp_path / "shared", 10**6)
    for cache in (one, two):
        cache.open(lambda: "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        value = torch.randn(3, 4).to(dtype)
        one.put(b"key", value)
        assert torch.equal(two.get(b"key"), value) and two.get(b"key").dtype == dtype
    assert two.get(b"other") is None


def test_files_that_another_process_renames_are_no_errors(tmp_path, monkeypatch, caplog):
    cache = DiskCache(tmp_path, 10**6)
    cache.open(lambda: "0" * 64)
    (tmp_path / ("0" * 64) / ".half.tmp").write_bytes(b"written")
    scandir = os.scandir

    def renamed(folder):
        for entry in list(scandir(folder)):
            if entry.name.endswith(".tmp"):
                os.rename(entry.path, f"{folder}/whole")
            yield entry

    monkeypatch.setattr(os, "scandir", renamed)
    again = DiskCache(tmp_path, 10**6)
    again.open(lambda: "0" * 64)
    again.put(b"key", torch.ones(2, 3))
    assert torch.equal(again.get(b"key"), torch.ones(2, 3)) and not caplog.records


def test_memory_keeps_a_share_of_every_epoch_but_not_what_is_never_asked_for():
    value, generator = torch.zeros(10), torch.Generator().manual_seed(0)
    cache = MemoryCache(50 * value.nbytes)
    hits = []
    for _ in range(20):
        order = torch.randperm(100, generator=generator).tolist()
        found = 0
        for number in order:
            key = str(number).encode()
            if cache.get(key) is None:
                cache.put(key, value)
            else:
                found += 1
        hits.append(found)
        assert cache.bytes <= cache.limit
    assert min(hits[1:]) >= 40  # of 100, with room for 50; the least recently used thrown out would give about 15
    for _ in range(4):
        found = 0
        for number in range(1000, 1040):  # other examples
            key = str(number).encode()
            if cache.get(key) is None:
                cache.put(key, value)
            else:
                found += 1
    assert found == 40
    cache.put(b"large", torch.zeros(1000))
    assert cache.get(b"large") is None


def test_settings():
    assert read_setting("auto") == ("auto", None) and read_setting("off") == ("off", None)
    assert read_setting("memory:2GiB") == ("memory", 2 * 2**30) and read_setting("disk:1.5MB") == ("disk", 1_500_000)
    assert read_setting("memory:100") == ("memory", 100) and read_setting("disk") == ("disk", None)
    for wrong in ("on", "2GiB", "off:1", "memory:", "memory:many", "disk:2XB", "disk:-1", "memory:1iB", None):
        with pytest.raises(ValueError, match="expected"):
            read_setting(wrong)
    with pytest.raises(ValueError, match="memory:SIZE"):
        optimizer("ram")


def test_kept_states_are_not_used_while_a_lower_block_is_in_training_mode(caplog):
    opt, batch = optimizer("memory"), lm_batch(4)
    losses = []
    for training in (False, True, False):
        opt.model.get_submodule("base_model.model.model.layers.0").train(training)
        with caplog.at_level(logging.WARNING, logger="adazeta"):
            losses.append(opt.estimate(lm_loss, batch))
        losses.append(opt.prefix.hits)
        opt.zero_grad()
    assert losses[1::2] == [0, 0, 0] and losses[0] == losses[4]  # forgotten meanwhile
    assert caplog.text.count("layers.0 is in training mode; call model.eval()") == 1
