"""Digests of numbers: of theta after a step, of a saved adapter, of the frozen weights below it."""

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch

import adazeta_kernels

from .frozen import named_parameters
from .quantized import plain_parts

SAMPLES = 65_536  # numbers of a frozen tensor that its digest reads


def _bytes(tensor: torch.Tensor):
    # Flat first: a scalar has no dimension to be viewed along.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def sha256_of(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes, one after another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def crc_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the CRC-32 of the tensors' bytes, one after another: a quick check that two machines hold the same."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(_bytes(tensor), crc)
    return crc


def json_sha256(value) -> str:
    """Return the SHA-256 of a JSON value, written with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_sha256() -> str:
    """Return the SHA-256 of the Python source of both packages: what runs here, whatever its version says."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(adazeta_kernels.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@torch.no_grad()
def base_sha256(model: torch.nn.Module, trained: Iterable[torch.Tensor] = ()) -> str:
    """Return a digest of the frozen weights of ``model``, the same in float32 and bfloat16, packed or not.

    It covers name and shape of every parameter and, rounded to bfloat16, all of its numbers or ``SAMPLES`` evenly
    spaced ones: another checkpoint, size or fine-tuning is told apart in a second, a single changed number may not be.

    Args:
        model: on any device; of parameters without data (meta) name and shape count.
        trained: parameters to leave out, those that training changes. TT adapters are left out anyway.
    """
    left_out = {id(parameter) for parameter in trained}
    digest = hashlib.sha256()
    for name, parameter in named_parameters(model):
        if id(parameter) in left_out or ".tt_theta." in name:
            continue
        name = name.replace(".base_layer.", ".")  # the base is the same wherever its adapters are
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        if hasattr(parameter, "full_tensor"):  # split over processes, which all come here together
            parameter = parameter.full_tensor()
        for part in plain_parts(parameter.detach()):
            if part.device.type != "meta":
                flat = part.reshape(-1)
                sample = flat[:: -(-flat.numel() // SAMPLES) or 1]
                half = sample.is_floating_point() and sample.itemsize > 1
                digest.update(_bytes(sample.to(torch.bfloat16) if half else sample))
    return digest.hexdigest()
