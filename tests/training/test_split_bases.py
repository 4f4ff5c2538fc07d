"""Base models too large for one device: split over processes by tensors, queries over replicas; blocks left on disk."""

import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from on_ranks import on_ranks
from peft import get_peft_model
from tiny import lm_batch, tiny_llama
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from adazeta import TTConfig, ZerothOrder
from adazeta.distributed import Ranks, open_journal
from adazeta.journal import NAME, read
from adazeta.losses import lm_loss

REPLICAS = "dp_replicate_size" in inspect.signature(DistributedConfig).parameters
only_with_replicas = pytest.mark.skipif(not REPLICAS, reason="this transformers makes no replicas of a split model")
SETTINGS = {"lr": 0.1, "eps": 0.05, "momentum": 0.9, "run_seed": 7, "queries": 3}


def adapted(base):
    return get_peft_model(base, TTConfig(rank=3, bottleneck=8, act="gelu")).eval()


def train(opt):
    losses = []
    for k in range(3):
        losses.append(opt.estimate(lm_loss, lm_batch(4, seed=k)))
        opt.step()
    return losses


@pytest.fixture
def saved(tmp_path):
    """Return the folder of a tiny model and what a run on the whole of it finds: losses, theta."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked from here
    tiny_llama().save_pretrained(tmp_path / "base")
    opt = ZerothOrder(adapted(tiny_llama()), **SETTINGS)
    yield tmp_path / "base", train(opt), opt.trainable().tensors[0].clone()
    torch.set_num_threads(threads)


@only_with_replicas
def test_a_base_split_by_tensors_with_the_queries_over_two_replicas(tmp_path, saved):
    folder, losses, theta = saved

    def work(rank):
        config = DistributedConfig(tp_size=2, dp_replicate_size=2)
        base = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
        assert base.model.layers[0].mlp.down_proj.weight.to_local().shape == (32, 24)  # half of it is here
        groups = [dist.new_group([part, part + 2]) for part in (0, 1)]
        opt = ZerothOrder(adapted(base), ranks=Ranks(group=groups[rank % 2], check_every=1), **SETTINGS)
        open_journal(opt, tmp_path / f"part-{rank % 2}" / NAME)
        torch.save((train(opt), opt.trainable().tensors[0].clone()), tmp_path / f"rank-{rank}")

    assert on_ranks(4, tmp_path / "work", work) == ([0] * 4, [])
    found = [torch.load(tmp_path / f"rank-{rank}") for rank in range(4)]
    for its_losses, its_theta in found:
        assert its_losses == pytest.approx(losses, abs=1e-6)
        torch.testing.assert_close(its_theta, theta, rtol=0, atol=1e-4)
        assert torch.equal(its_theta, found[0][1])
    assert [len(read(tmp_path / f"part-{part}" / NAME, repair=True).steps) for part in (0, 1)] == [3, 3]


@only_with_replicas
def test_the_lines_of_the_page(tmp_path, saved):
    page = (Path(__file__).resolve().parents[2] / "docs" / "many-machines.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "tp_size" in block]
    names = {**globals(), "folder": saved[0]}

    def work(rank):
        os.chdir(tmp_path)
        exec(compile(block, "many-machines.md", "exec"), names)
        names["opt"].estimate(lm_loss, lm_batch(4))
        names["opt"].step()
        torch.save(names["opt"].trainable().tensors[0].clone(), tmp_path / f"rank-{rank}")

    assert on_ranks(4, tmp_path / "work", work) == ([0] * 4, [])
    found = [torch.load(tmp_path / f"rank-{rank}") for rank in range(4)]
    assert all(torch.equal(theta, found[0]) for theta in found)
    assert [len(read(tmp_path / "run" / f"journal-{part}.azj").steps) for part in (0, 1)] == [1, 1]


def test_blocks_that_are_left_on_disk(tmp_path, saved):
    folder, losses, theta = saved
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{block}": "disk" if block else "cpu" for block in range(3)}
    base = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
    assert base.model.layers[1].mlp.down_proj.weight.device.type == "meta"
    opt = ZerothOrder(adapted(base), **SETTINGS)
    opt.write_journal(tmp_path / NAME)
    assert train(opt) == losses
    assert torch.equal(opt.trainable().tensors[0], theta)
