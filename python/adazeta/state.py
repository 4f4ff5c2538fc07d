"""What an interrupted run needs besides its parameters to go on with the same bits: counters, momentum, settings."""

from typing import Any

from .errors import SettingError

_SETTINGS = ("lr", "momentum", "weight_decay")


def state_of(optimizer) -> dict[str, Any]:
    """Return the state of a ``ZerothOrder`` that is not in torch's own ``param_groups``."""
    return {
        "step": optimizer.step_index,
        "rows": optimizer.rows,
        "evaluations": optimizer.evaluations,
        "tokens": (optimizer.tokens.processed, optimizer.tokens.real),
        "dropped": optimizer.dropped,
        "clipped": optimizer.clipped,
        "run_seed": optimizer.run_seed,
        "momentum": [m.clone() for m in optimizer._momentum],
        "settings": {name: optimizer.defaults[name] for name in _SETTINGS},
    }


def check_state(optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse the state of another run before anything is restored.

    Raises:
        SettingError: it belongs to another run seed or to other parameters.
    """
    own = state_dict["zeroth_order"]
    if own["run_seed"] != optimizer.run_seed:
        raise SettingError(f"the state was saved with run_seed {own['run_seed']}, this run has {optimizer.run_seed}")
    shapes = [t.shape for t in optimizer.trainable().tensors]
    if own["momentum"] and [m.shape for m in own["momentum"]] != shapes:
        raise SettingError(f"momentum of shapes {[tuple(m.shape) for m in own['momentum']]} does not fit {shapes}")


def restore(optimizer, state_dict: dict[str, Any]) -> None:
    """Take the state up; of lr, momentum and weight decay what is set now, where it is new.

    A new ``lr`` is scaled as a schedule had scaled the old one (a scheduler keeps rates of its own: ``base_lrs``).

    Args:
        optimizer: a ``ZerothOrder`` whose ``param_groups`` have been restored.
        state_dict: what its ``state_dict`` returned, checked.
    """
    own = state_dict["zeroth_order"]
    group, now = optimizer.param_groups[0], optimizer.defaults
    changed = {name for name, value in own.get("settings", {}).items() if value != now[name]}
    group.update({name: now[name] for name in changed})
    if "lr" in changed:
        then, scheduled = own["settings"]["lr"], state_dict["param_groups"][0]["lr"]
        group["lr"], group["initial_lr"] = now["lr"] * (scheduled / then if then else 1.0), now["lr"]
    optimizer.step_index, optimizer.rows, optimizer.evaluations = own["step"], own["rows"], own["evaluations"]
    optimizer.dropped, optimizer.clipped = own["dropped"], own["clipped"]
    optimizer._counted = (optimizer.rows, optimizer.evaluations)
    optimizer.tokens.restore(*own.get("tokens", (0, 0)))
    tensors = optimizer.trainable().tensors
    optimizer._momentum = [m.to(t.device).clone() for m, t in zip(own["momentum"], tensors)]
