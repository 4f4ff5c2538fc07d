"""One step of MeZO over all parameters of a model: as plain torch has it, and with `perturb_` (docs/kernels.md)."""

import torch

from adazeta_kernels import perturb_


@torch.no_grad()
def plain_step(model, loss_fn, batch, lr, eps, seed):
    params = [p for p in model.parameters() if p.requires_grad]

    def perturb(scale):
        torch.manual_seed(seed)
        for p in params:
            z = torch.normal(0.0, 1.0, p.shape, dtype=p.dtype, device=p.device)
            p.data = p.data + scale * z

    perturb(eps)
    plus = loss_fn(model, batch)
    perturb(-2 * eps)
    minus = loss_fn(model, batch)
    perturb(eps)
    gradient = float(plus - minus) / (2 * eps)
    perturb(-lr * gradient)
    return plus


@torch.no_grad()
def perturb_step(model, loss_fn, batch, lr, eps, seed):
    params = [p.data for p in model.parameters() if p.requires_grad]
    perturb_(params, [seed], [eps])
    plus = loss_fn(model, batch)
    perturb_(params, [seed], [-2 * eps])
    minus = loss_fn(model, batch)
    gradient = float(plus - minus) / (2 * eps)
    perturb_(params, [seed], [eps - lr * gradient])  # back, and on by the update: one pass
    return plus
