"""The tensor-train adapter as a PEFT method: ``peft.get_peft_model(model, TTConfig(rank=5, bottleneck=64))``."""

from .registration import add_peft_type, register

add_peft_type("TT")  # before config.py, whose default refers to the member

from .config import TTConfig  # noqa: E402
from .layer import TTLayer  # noqa: E402
from .model import TTModel  # noqa: E402

register()

__all__ = ["TTConfig", "TTLayer", "TTModel"]
