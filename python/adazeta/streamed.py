"""Parameters at a probe, made when they are read: the stored ones are never written, and nothing drifts.

Inside the ``with`` statement a module's parameter, read as its attribute (``module.weight``) by whatever code, is a
perturbed copy. The copies of one module lie in one scratch buffer, which the next module that is asked takes over.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adazeta_kernels import perturb_

from .forwards import is_compiled
from .tokens import looking

#: Where a parameter may begin in the scratch buffer, in bytes: as torch aligns memory on a GPU.
ALIGNMENT = 512


class Streamed:
    """Parameters of a model that move from probe to probe inside a ``with`` statement while the stored ones stay.

    A parameter that several modules share is the same in all of them. Each module costs a pass over its parameters
    whenever it is asked after another one. Memory: the largest set of one module; another one of that size for as long
    as code holds on to a parameter while others are read.

    Args:
        model: whose modules own the parameters.
        parameters: some of the model's by name, in the order of the direction: the first element has index ``offset``.
        offset: index of the first element in a direction.
        distribution: ``"gaussian"`` or ``"rademacher"``.

    Raises:
        ValueError: a module that is compiled or scripted.

    Numerics: the bits of ``perturb_`` on a copy of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        *,
        offset: int = 0,
        distribution: str = "gaussian",
    ):
        self._parameters, self._distribution = dict(parameters), distribution
        self._seed, self._scale = 0, 0.0
        self._modules: list[tuple[nn.Module, dict, _Perturbed]] = []  # what each holds itself, and inside the statement
        self._room: dict[torch.device, int] = {}  # bytes of the largest set
        self._scratch: dict[torch.device, list[torch.Tensor]] = {}
        self._last: _Perturbed | None = None  # whose parameters are in the scratch buffer
        self._made: dict[str, torch.Tensor] = {}
        self._copying = False
        offsets = {}
        for parameter in self._parameters.values():
            offsets[id(parameter)] = offset
            offset += parameter.numel()
        for name, module in model.named_modules():
            own = {key: offsets[id(p)] for key, p in module._parameters.items() if id(p) in offsets}
            if is_compiled(module):
                raise ValueError(
                    f"module {name!r} is compiled, and compiled code reads parameters in its own way; use "
                    "perturb='in-place'"
                )
            if own:
                self._modules.append((module, module._parameters, _Perturbed(module._parameters, own, self)))
                self._measure([module._parameters[key] for key in own])

    def _measure(self, parameters: list[torch.Tensor]) -> None:
        for device in {p.device for p in parameters}:
            size = sum(_aligned_bytes(p) for p in parameters if p.device == device)
            self._room[device] = max(size, self._room.get(device, 0))

    def __enter__(self) -> "Streamed":
        for module, _, perturbed in self._modules:
            module._parameters = perturbed
        return self

    def __exit__(self, *raised) -> None:
        for module, held, _ in self._modules:
            module._parameters = held
        self._forget()
        self._scratch = {}

    def move_to(self, seed: int, scale: float) -> None:
        """Let the parameters be read as ``theta + scale * z(seed)`` from now on."""
        self._forget()
        self._seed, self._scale = seed, scale

    def of_probes(self, module: nn.Module, probes: Sequence[tuple[int, float]]) -> dict[str, torch.Tensor]:
        """Return ours of ``module``'s own parameters at ``probes``, seed and scale of each: ``[probes, *shape]``.

        Numerics: the bits that they have at one probe after another.
        """
        own = next((perturbed for held, _, perturbed in self._modules if held is module), None)
        if own is None:
            return {}
        stored = {key: own.stored(key).detach() for key in own.offsets}
        copies = {key: value.repeat(len(probes), *[1] * value.ndim) for key, value in stored.items()}
        ends = [own.offsets[key] + value.numel() for key, value in stored.items()]
        in_a_row = list(own.offsets.values())[1:] == ends[:-1]  # then they are one list of tensors to perturb_
        self._copying = True
        try:
            for keys in [list(copies)] if in_a_row else [[key] for key in copies]:
                for (seed, scale), *at_probe in zip(probes, *(copies[key] for key in keys)):
                    offset = own.offsets[keys[0]]
                    perturb_(at_probe, [seed], [scale], offset=offset, distribution=self._distribution)
        finally:
            self._copying = False
        return copies

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Raise where code reads a stored value past the modules' attributes, and so would miss the perturbation.

        A penalty on ``model.parameters()`` does, and so do modules that keep their weights in a list and never look at
        the attributes again. Slows a forward down several times.

        Raises:
            ValueError: names the parameter and the operation that reads it.
        """
        with _StoredReads(self):
            yield

    def _forget(self) -> None:
        self._last, self._made = None, {}

    @torch.compiler.disable
    def _read(self, owner: "_Perturbed", key: str, stored: torch.Tensor) -> torch.Tensor:
        """Return ``stored`` at the present probe; made anew unless ``owner`` was the last to be asked."""
        if looking.get():  # tensors without numbers must not become the scratch buffers of those that have some
            return stored
        if owner is not self._last:
            self._forget()
            self._last = owner
        if key not in self._made:
            copy = self._place(stored)
            self._copying = True
            try:
                copy.copy_(stored)
                perturb_(
                    [copy], [self._seed], [self._scale], offset=owner.offsets[key], distribution=self._distribution
                )
            finally:
                self._copying = False
            # As the stored one requires grad or not: torch folds some products into another shape where a weight does.
            kept = isinstance(stored, nn.Parameter)
            self._made[key] = nn.Parameter(copy, requires_grad=stored.requires_grad) if kept else copy
        return self._made[key]

    def _place(self, stored: torch.Tensor) -> torch.Tensor:
        """Return room for ``stored`` in a scratch buffer, behind what the present module has there."""
        device = stored.device
        used = sum(_aligned_bytes(made) for made in self._made.values() if made.device == device)
        buffers = self._scratch.setdefault(device, [])
        if used == 0:  # the buffer in use by this module is the first
            free = next((k for k, buffer in enumerate(buffers) if not _in_use(buffer)), None)
            buffer = _allocate(self._room[device], device) if free is None else buffers.pop(free)
            buffers.insert(0, buffer)
        return buffers[0][used : used + stored.nbytes].view(stored.dtype).view(stored.shape)


class _Perturbed(dict):
    """A module's ``_parameters``: an attribute's value is read by key and perturbed, iteration gives what is stored."""

    def __init__(self, held: dict, offsets: dict[str, int], streamed: Streamed):
        super().__init__(held)
        self.offsets, self._streamed = offsets, streamed

    def stored(self, key: str) -> torch.Tensor:
        return super().__getitem__(key)

    def __getitem__(self, key):
        stored = self.stored(key)
        return self._streamed._read(self, key, stored) if key in self.offsets else stored


class _StoredReads(TorchDispatchMode):
    def __init__(self, streamed: Streamed):
        super().__init__()
        self._streamed = streamed
        self._spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, n) for n, p in streamed._parameters.items())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._streamed._copying:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.numel() and (name := self._name_of(value)):
                    raise ValueError(
                        f"{func} reads the stored values of {name}, not the attribute of its module, so a streamed "
                        "perturbation would not reach it; use perturb='in-place'"
                    )
        return func(*args, **(kwargs or {}))

    def _name_of(self, value: torch.Tensor) -> str | None:
        if value.layout is not torch.strided:  # a packed frozen layer's: without an address, and none of ours
            return None
        place = bisect_right(self._spans, (value.data_ptr(), float("inf"))) - 1
        return self._spans[place][2] if place >= 0 and value.data_ptr() < self._spans[place][1] else None


def _aligned_bytes(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _allocate(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _references(tensor: torch.Tensor) -> int:
    """Count the tensors and wrappers that keep the memory of ``tensor`` alive."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_UNSHARED = _references(torch.empty(1))


def _in_use(scratch: torch.Tensor) -> bool:
    """Whether anything but ``scratch`` itself keeps its memory: a view that a module has kept, for example."""
    return _references(scratch) > _UNSHARED
