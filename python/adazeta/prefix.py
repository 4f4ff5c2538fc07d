"""Blocks below the first adapter see no perturbation: run them once per example instead of once per probe.

The expanded batch holds every example once per probe. At the entry of the first block the copies are dropped, at the
entry of the first adapted block they are made again, so neither the model's code nor the loss function notices.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def shared_prefix(tt_model, adapter: str, rows: torch.Tensor) -> Iterator[int]:
    """Share the blocks below the first adapter between rows with the same example, inside the ``with`` statement.

    Args:
        tt_model: a ``TTModel``; its adapted layers must sit in one list of blocks (``model.layers.<i>...``), whose
            blocks take the hidden states ``[rows, tokens, width]`` as first argument.
        adapter: name of the adapter.
        rows: ``[N]`` example index of every row of the expanded batch.

    Yields:
        The number of rows that each shared block runs: the distinct examples, or N where nothing can be shared.
    """
    found = tt_model.block_list(adapter)
    unique, inverse = torch.unique(rows, return_inverse=True)
    if found is None or found[1] == 0 or len(unique) == len(rows):
        yield len(rows)
        return
    name, first = found
    blocks = tt_model.model.get_submodule(name)
    # Row of the expanded batch that stands for each distinct example.
    representative = torch.empty_like(unique).scatter_(0, inverse.flip(0), torch.arange(len(rows)).flip(0))

    def reduce(value):
        if torch.is_tensor(value) and value.ndim > 1 and value.shape[0] == len(rows):
            return value.index_select(0, representative.to(value.device))
        if isinstance(value, tuple):
            return tuple(reduce(v) for v in value)
        return value

    def enter(module, args, kwargs):
        if args:
            return tuple(reduce(v) for v in args), {k: reduce(v) for k, v in kwargs.items()}
        return args, {k: reduce(v) for k, v in kwargs.items()}

    def leave(module, args, kwargs):
        # Masks and positions come from the model anew for every block and still have all rows; only the hidden states,
        # handed on from block to block, have to be expanded.
        if args:
            return (args[0].index_select(0, inverse.to(args[0].device)), *args[1:]), kwargs
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden.index_select(0, inverse.to(hidden.device))}

    handles = [blocks[i].register_forward_pre_hook(enter, with_kwargs=True) for i in range(first)]
    handles.append(blocks[first].register_forward_pre_hook(leave, with_kwargs=True))
    try:
        yield len(unique)
    finally:
        for handle in handles:
            handle.remove()
