"""How the processes that ``torchrun`` started find each other, also those that it starts again."""

import atexit
import os
import re
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from .errors import UserError


def begin_group(timeout: timedelta) -> bool:
    """Begin a process group of gloo, unless there is one; return whether there is: torchrun may have started no other.

    Args:
        timeout: how long a rank waits for the others, at first and in every exchange.

    Raises:
        UserError: the others did not come.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return False
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(_life(store, rank, size, timeout), store)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
            atexit.register(_end_group)
        except (RuntimeError, ValueError) as error:
            where = f"rank {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']}"
            raise UserError(
                f"{where} cannot join the others ({reason_of(error)}); torchrun starts all of them"
            ) from error
    return True


def _end_group() -> None:
    """End the group that was begun, before Python ends: gloo's threads may still hold tensors of the last exchange.

    A thread that lets go of one while the interpreter is finalized aborts the process ("terminate called without an
    active exception"), and torchrun then takes a run that is complete for one that failed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _life(store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that rank 0 makes up and gives to the other ranks that live now.

    The store of torchrun outlives restarts, with the addresses of processes that are gone (pytorch issue 135712); under
    a name of their own the living don't find them. Rank 0 answers all questions, those of the dead too, until all ranks
    say that they have its answer.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"asked/{store.add('asked', 1)}", name)
        life = store.get(f"answer/{name}").decode()
        store.set(f"{life}/{rank}", "here")
        return life
    life, answered, until = uuid.uuid4().hex, set(), time.monotonic() + timeout.total_seconds()
    while not store.check([f"{life}/{other}" for other in range(1, size)]):
        for question in {f"asked/{n + 1}" for n in range(store.add("asked", 0))} - answered:
            if store.check([question]):  # else who asks is about to say its name, or died before
                store.set(f"answer/{store.get(question).decode()}", life)
                answered.add(question)
        if time.monotonic() > until:
            raise RuntimeError(f"not all of {size} came within {timeout}")
        time.sleep(0.02)
    return life


def reason_of(error: Exception) -> str:
    """Return what gloo or NCCL says, without where in their source and without advice."""
    line = re.sub(r"\[/[^]]*\] ", "", str(error).strip().splitlines()[0])
    return line.split(". ")[0][:160]
