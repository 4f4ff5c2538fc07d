"""Where a configuration puts adapters into a model, and how large they are, told before any module is made."""

import copy
import re
import warnings

from peft.tuners.tuners_utils import BaseTuner, _get_in_out_features, check_target_module_exists
from torch import nn

from adazeta_kernels import TTAdapterLayout

from .config import TTConfig
from .sites import candidate_modules, placement_of, resolve_layers, resolve_sites


def resolve(config: TTConfig, model: nn.Module, model_config: dict) -> TTConfig:
    """Put names of modules and indices of blocks in the place of names of choices; return ``config``.

    They are stored in the saved configuration, so that a later change of the table of sites cannot move the adapters
    of a saved model.
    """
    if isinstance(config.sites, str) and config.target_modules is not None:
        config.sites = {}
    else:
        config.sites = resolve_sites(config.sites, model_config.get("model_type"), candidate_modules(model))
    config.layers_to_transform = resolve_layers(config.layers_to_transform, model_config)
    if config.target_modules is None:
        config.target_modules = {name for name, placement in config.sites.items() if placement != "none"}
    return config


def is_place(config: TTConfig, key: str):
    """Return whether the module named ``key`` gets an adapter, as PEFT tells it; ``config`` is resolved.

    Of ``layers_to_transform`` PEFT leaves out all that is in no block. A module that is named by its path, such as
    ``classifier.dense``, is meant all the same.
    """
    found = check_target_module_exists(config, key) or _is_named_beside_blocks(config, key)
    return found if found and placement_of(key, config.sites) != "none" else False


def _is_named_beside_blocks(config: TTConfig, key: str) -> bool:
    if config.layers_to_transform is None or not isinstance(config.target_modules, set) or re.search(r"\.\d+\.", key):
        return False
    return any(key == name or ("." in name and key.endswith(f".{name}")) for name in config.target_modules)


def layout_at(config: TTConfig, model: nn.Module, layer: nn.Module, key: str) -> TTAdapterLayout:
    """Return the layout of the adapter at the module ``layer``, named ``key``; ``config`` is resolved.

    Raises:
        ValueError: a module that has no width, or one that no TT shape fits.
    """
    return TTAdapterLayout.auto(
        _width(model, layer, placement_of(key, config.sites), key),
        bottleneck=config.bottleneck,
        rank=tuple(config.rank) if isinstance(config.rank, list) else config.rank,
        shapes=config.shapes,
        bias=config.bias,
    )


def saved_shapes(model: nn.Module, config: TTConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of what PEFT saves of adapters of ``config`` in ``model``, which has none yet.

    Raises:
        ValueError: as for :func:`layout_at`.
    """
    config = resolve(copy.deepcopy(config), model, BaseTuner.get_model_config(model))
    whole, found = tuple(config.modules_to_save or ()), {}
    for name, module in model.named_modules():
        if is_place(config, name):
            found[f"base_model.model.{name}.tt_theta"] = (layout_at(config, model, module, name).numel,)
        elif name.endswith(whole):
            for key, tensor in module.state_dict().items():
                found[f"base_model.model.{name}.{key}"] = tuple(tensor.shape)
    return found


def tt_head(model: nn.Module, sites, modules_to_save: list[str]) -> dict:
    """Return settings of a ``TTConfig`` for a head of which the last linear layer trains in full, the others as TT.

    Args:
        model: a classification model without adapters.
        sites: of its blocks, as ``TTConfig`` takes them.
        modules_to_save: :func:`adazeta.heads.head_modules` of the model.

    Returns:
        ``sites`` with the head's inner linear layers, and ``modules_to_save``; nothing where the head is one layer.

    Raises:
        ValueError: names that PEFT, which takes modules by the ends of their names, cannot tell apart.
    """
    linears = [
        f"{name}.{inner}" if inner else name
        for name in modules_to_save
        for inner, layer in model.get_submodule(name).named_modules()
        if isinstance(layer, nn.Linear)
    ]
    *inner, last = linears
    if mixed := [name for name in inner if name.endswith(last)]:
        raise ValueError(f"a head as TT: PEFT takes {mixed[0]!r} for {last!r}, whose name it ends in; use --head full")
    if not inner:
        return {}
    placed = resolve_sites(sites, model.config.model_type, candidate_modules(model))
    return {"sites": {**placed, **dict.fromkeys(inner, "post")}, "modules_to_save": [last]}


def _width(model: nn.Module, layer: nn.Module, placement: str, key: str) -> int:
    hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
    if hidden_size and next(layer.children(), None) is not None:
        return hidden_size  # a whole sub-block, such as a mixture of experts: hidden states in, hidden states out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features = _get_in_out_features(layer)
    width = features[1] if placement == "post" else features[0]
    if width is None or isinstance(layer, (nn.Embedding, nn.Conv2d, nn.Conv3d)):
        raise ValueError(
            f"cannot put a TT adapter on {key!r}: expected a linear layer with in_features and out_features, got "
            f"{type(layer).__name__}; linear layers of this model: {', '.join(candidate_modules(model))}"
        )
    return width
