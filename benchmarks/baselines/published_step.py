"""The AdaZeta step as its authors' code takes it, written anew in plain torch: what `bench_step.py` compares with.

Queries one after another, two forwards each. A perturbation goes through the parameters one by one: the global
generator is seeded, `torch.normal` draws a direction as large as the parameter, and the parameter becomes a new tensor.
Twice to the two points, once back; the update draws every direction again. The adapters are modules in float32 that
cast what they get; the model computes logits at all positions of padded rows. No gradients, eval mode, the base model
in whatever dtype it has.

What is kept from the published code is the algorithm and the operations it costs, not its text. Where it goes wrong
without that costing time, it is mended, so that losses can be compared: no `squeeze()` of a batch of one token, logits
of the scored words are float32 before they are subtracted, and the loss that is reported is not the last query's.

Source: AdaZeta (arXiv 2406.18060), algorithm 1; MeZO (arXiv 2305.17333) for seeds instead of stored directions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from adazeta_kernels import TTAdapterLayout, TTShape

Normals = Callable[[int, Sequence[nn.Parameter]], Iterator[torch.Tensor]]


def torch_normals(seed: int, parameters: Sequence[nn.Parameter]) -> Iterator[torch.Tensor]:
    """Yield one direction per parameter from the global generator, as the published code draws them."""
    torch.manual_seed(seed % 2**63)
    for p in parameters:
        yield torch.normal(mean=0.0, std=1.0, size=p.size(), dtype=p.dtype, device=p.device)


class TTLinear(nn.Module):
    """`x W + b`, with W contracted from its cores as in the published code: both halves in parallel, then `(x L) R`."""

    def __init__(self, shape: TTShape, bias: bool):
        super().__init__()
        self.shape = shape
        for k, size in enumerate(shape.core_shapes):
            self.register_parameter(f"core{k}", nn.Parameter(torch.zeros(size)))
        self.bias = nn.Parameter(torch.zeros(shape.d_out)) if bias else None  # last, as in TTAdapterLayout.segments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs, rank = len(self.shape.in_factors), self.shape.bond
        cores = [getattr(self, f"core{k}") for k in range(len(self.shape.core_shapes))]
        left, right = cores[0].squeeze(0), cores[inputs]
        for core in cores[1:inputs]:
            left = torch.tensordot(left, core, 1)
        for core in cores[inputs + 1 :]:
            right = torch.tensordot(right, core, 1)
        x = x.reshape(*x.shape[:-1], *self.shape.in_factors)
        y = torch.tensordot(torch.tensordot(x, left, inputs), right.reshape(rank, -1), 1)
        return y if self.bias is None else y + self.bias


class AdaptedLinear(nn.Module):
    """A frozen module with `x + up(relu(down(x)))` behind it, in float32."""

    def __init__(self, base: nn.Module, layout: TTAdapterLayout):
        super().__init__()
        self.base = base
        self.down, self.up = TTLinear(layout.down, layout.bias), TTLinear(layout.up, layout.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + self.up(torch.relu(self.down(y.float()))).to(y.dtype)


class PublishedStep:
    """Zeroth-order SGD on the adapters of `model`, into which they are put here.

    Args:
        model: a transformers model; its parameters are frozen, its modules at `sites` are replaced.
        sites: module name -> layout; the numbers start at zero (`load`).
        words: token ids of the label words; the loss is the cross entropy over their logits.
        eps, lr, weight_decay: as published; biases are not decayed.
        normals: where directions come from; to compare losses, those of the other implementation.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, TTAdapterLayout],
        words: Sequence[int],
        *,
        eps: float,
        lr: float,
        weight_decay: float = 0.0,
        normals: Normals = torch_normals,
    ):
        self.model, self.words = model.requires_grad_(False).eval(), list(words)
        self.eps, self.lr, self.weight_decay, self.normals = eps, lr, weight_decay, normals
        for name, layout in sites.items():
            parent, _, child = name.rpartition(".")
            base = model.get_submodule(name)
            device = next(base.parameters()).device
            setattr(model.get_submodule(parent), child, AdaptedLinear(base, layout).to(device))
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def load(self, theta: torch.Tensor) -> None:
        """Set all trainable numbers from one flat vector, in the order of the parameters."""
        parts = theta.split([p.numel() for _, p in self.named])
        for (_, p), part in zip(self.named, parts):
            p.data = part.view(p.shape).clone()

    def perturb(self, seed: int, scale: float) -> None:
        parameters = [p for _, p in self.named]
        for p, z in zip(parameters, self.normals(seed, parameters)):
            p.data = p.data + scale * self.eps * z

    def losses(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of every row, from the logits of all positions."""
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        rows = torch.arange(len(logits), device=logits.device)
        scores = logits[rows, batch["positions"]][:, self.words].float()
        return nn.functional.cross_entropy(scores, batch["labels"], reduction="none")

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the language-model head at all positions: the part of a forward that scoring one position saves."""
        return self.model.lm_head(hidden)

    @torch.no_grad()
    def estimate(self, batch: Mapping[str, torch.Tensor], seeds: Sequence[int]) -> tuple[list[float], torch.Tensor]:
        """Return the projected gradient of every query, and all losses `[queries, 2, rows]`."""
        projected, losses = [], []
        for seed in seeds:
            self.perturb(seed, 1)
            plus = self.losses(batch)
            self.perturb(seed, -2)
            minus = self.losses(batch)
            projected.append(((plus.mean() - minus.mean()) / (2 * self.eps)).item())
            self.perturb(seed, 1)
            losses.append(torch.stack((plus, minus)))
        return projected, torch.stack(losses)

    @torch.no_grad()
    def update(self, seeds: Sequence[int], projected: Sequence[float]) -> None:
        gradients = {name: torch.zeros_like(p) for name, p in self.named}
        for seed, value in zip(seeds, projected):
            for (name, _), z in zip(self.named, self.normals(seed, [p for _, p in self.named])):
                gradients[name] += value * z
        for name, p in self.named:
            decay = 0.0 if "bias" in name else self.weight_decay
            p.data = p.data - self.lr * (gradients[name] / len(seeds) + decay * p.data)

    def step(self, batch: Mapping[str, torch.Tensor], seeds: Sequence[int]) -> float:
        """Estimate and update; return the mean of all losses."""
        projected, losses = self.estimate(batch, seeds)
        self.update(seeds, projected)
        return float(losses.mean())
