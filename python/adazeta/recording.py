"""What a journal's header says about a run, so that a replay needs neither the base model nor the data."""

import torch

from .journal import rebuild_initial, sha256_of


def describe_run(optimizer) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the header for ``optimizer``'s run and the initial values that its seed does not rebuild.

    Args:
        optimizer: a ``ZerothOrder``.

    Returns:
        ``(header, initial)``; ``initial`` is empty when the adapter still is what ``TTConfig.init_seed`` makes and no
        other parameter is trained.
    """
    tensors = optimizer.trainable().tensors
    config = optimizer.tt_model.peft_config[optimizer.adapter] if optimizer.tt_model else None
    header = {
        "version": 1,
        "run_seed": optimizer.run_seed,
        "distribution": optimizer.distribution,
        "init": {"init": config.init, "gain": config.init_gain, "seed": config.init_seed} if config else None,
        "sites": [
            {"name": f"base_model.model.{name}.tt_theta", "layout": layout.encode()} for name, layout in optimizer.sites
        ],
        "params": [
            {"name": _saved_name(name, optimizer.adapter), "shape": list(p.shape), "decayed": p.ndim > 1}
            for name, p in optimizer.others.items()
        ],
        "initial_sha256": sha256_of(tensors),
    }
    initial = {_saved_name(name, optimizer.adapter): p.data for name, p in optimizer.others.items()}
    if optimizer.tt_model:
        theta = optimizer.tt_model.theta(optimizer.adapter)
        if not torch.equal(rebuild_initial(header), theta.cpu()):
            initial["theta"] = theta
    header["initial"] = "file" if initial else "seed"
    return header, initial


def _saved_name(name: str, adapter: str) -> str:
    """Return the name PEFT saves a parameter under: without the adapter's name and without its wrapper."""
    return name.replace(f".modules_to_save.{adapter}.", ".")
