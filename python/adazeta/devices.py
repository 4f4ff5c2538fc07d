"""Where to compute: the device that a flag names, checked before anything is loaded."""

import torch

from .errors import UserError


def chosen_device(name: str = "auto") -> torch.device:
    """Return the device of a name; ``auto`` is a GPU where torch finds one, else the CPU.

    Raises:
        UserError: no device of torch's, or a GPU where torch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: torch knows no such device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no GPU here; leave it out to compute on the CPU")
    return device
