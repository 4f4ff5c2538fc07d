"""What the host does in a step besides the model's forwards grows neither with layers nor from step to step."""

import ctypes
import gc
import json
import subprocess
import sys

import pytest
import torch
from tiny import lm_batch, tiny_adapted
from torch.utils._python_dispatch import TorchDispatchMode

from adazeta import ZerothOrder
from adazeta.footprint import LiveBytes
from adazeta.losses import lm_loss
from adazeta.memory import MIB
from adazeta.scoring import trunk_of


class Outside(TorchDispatchMode):
    """Count operations outside of the forwards of ``trunk``."""

    def __init__(self, trunk):
        super().__init__()
        self.count, self._inside = 0, 0
        trunk.register_forward_pre_hook(lambda *_: self._move(1))
        trunk.register_forward_hook(lambda *_: self._move(-1), always_call=True)

    def _move(self, by):
        self._inside += by

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self._inside
        return func(*args, **(kwargs or {}))


def stepped(layers, tmp_path, **config):
    """An optimizer after three steps, and what makes the next one."""
    model = tiny_adapted(layers, noise=0.2, **config)
    opt = ZerothOrder(model, lr=0.01, queries=3, weight_decay=0.1, momentum=0.9, directions="example")
    opt.write_journal(tmp_path / f"{layers}.azj")

    def step():
        opt.estimate(lm_loss, lm_batch(4))
        opt.step()

    for _ in range(3):
        step()
    return model, step


@pytest.mark.parametrize("upper", [False, True], ids=["all blocks", "the upper half"])
def test_operations_outside_of_forwards_do_not_grow_with_layers(upper, tmp_path):
    counts = []
    for layers in (2, 8):
        config = {"layers_to_transform": list(range(layers // 2, layers))} if upper else {}
        model, step = stepped(layers, tmp_path, **config)
        with Outside(trunk_of(model)) as outside:
            step()
        counts.append(outside.count)
    assert counts[0] == counts[1] > 10


def test_steps_leave_nothing_behind(tmp_path):
    _, step = stepped(3, tmp_path)

    def tensors():
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    alive, peaks = [], []
    for _ in range(3):
        with LiveBytes() as live:
            step()
            gc.collect()
        peaks.append((live.peak, live.now))
        alive.append(tensors())
    assert len(set(alive)) == 1 and len(set(peaks)) == 1
    assert peaks[0][1] < 4096 < peaks[0][0]  # a few numbers per query, which the next step replaces


_KEPT = """
import json, torch
from adazeta.memory import freed_memory_kept, MIB, _status

def held():  # what stays resident of 80 MiB that were made and freed
    before = _status("VmRSS:")
    tensors = [torch.ones(size * MIB) for size in [1] * 8 + [12]]
    del tensors
    return _status("VmRSS:") - before

figures = {}
start = _status("VmRSS:")
with freed_memory_kept():
    figures["kept"] = held()
    with freed_memory_kept():
        pass  # and does not end with an inner one
    figures["again"] = sorted(held() for _ in range(61))[30]  # holes that are just too small cost some rounds
figures["left"] = _status("VmRSS:") - start
print(json.dumps(figures))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the allocator is not glibc's")
def test_freed_memory_is_kept_and_given_back():
    # In a process of its own: the holes that other tests leave in the heap would serve these tensors.
    ran = subprocess.run([sys.executable, "-c", _KEPT], capture_output=True, text=True, check=True)
    bytes_of = json.loads(ran.stdout)
    assert bytes_of["kept"] > 72 * MIB
    assert bytes_of["again"] < 4 * MIB  # what was kept serves again
    assert bytes_of["left"] < 4 * MIB
