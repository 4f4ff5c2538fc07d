"""Makes ``TT`` a member of ``peft.PeftType``, which PEFT asks of every method it loads and saves.

``peft.register_peft_method`` refuses types that are not in the enumeration, and a Python enumeration cannot be
extended by assignment; the member is therefore made the way ``enum`` makes its own. Everything that touches PEFT's
internals for this is in this file.
"""

from peft import PeftType


def add_peft_type(name: str) -> PeftType:
    """Add ``name`` to ``PeftType`` (a ``str`` enumeration whose values equal the names) unless it is there already."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register() -> None:
    """Register the TT adapter as PEFT method ``"tt"``; a second call does nothing."""
    add_peft_type("TT")
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    from .config import TTConfig
    from .model import TTModel

    if PeftType["TT"] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="tt", config_cls=TTConfig, model_cls=TTModel)
