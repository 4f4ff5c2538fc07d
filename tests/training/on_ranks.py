"""Many ranks on one machine: forked processes that talk over loopback, and the command line in each of them."""

import contextlib
import os
import signal
import threading
import traceback

import torch
import torch.distributed as dist

from adazeta import cli

#: Seconds that all ranks of a test may take together.
LONGEST = 120


def on_ranks(size, folder, work, *, wire=None, meanwhile=None, **keywords):
    """Run ``work(rank)`` in ``size`` forked processes that talk over loopback; return exit statuses and tracebacks.

    Their environment is the one that torchrun gives. ``wire(rank)`` comes before they meet, ``meanwhile()`` runs here;
    ``keywords`` are those of ``init_process_group``.
    """
    folder.mkdir(exist_ok=True)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update(
                    RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size)
                )
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                # Torch makes its pool of threads anew in a fork, and fails where two threads ask for it at once.
                torch.set_num_threads(torch.get_num_threads())
                if wire:
                    wire(rank)
                meet = f"file://{folder}/meet"
                dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, **keywords)
                status = work(rank) or 0
            except BaseException:
                (folder / f"error-{rank}").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        children.append(child)
    if meanwhile:
        meanwhile()
    # A rank that waits for one that ended must not wait for ever.
    ends = threading.Timer(LONGEST, lambda: [_end(child) for child in children])
    ends.start()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    ends.cancel()
    return statuses, [path.read_text() for path in sorted(folder.glob("error-*"))]


def _end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def commands_on_ranks(folder, *commands):
    """Run one command line on each rank; return exit statuses, and what each rank printed (stdout, stderr)."""

    def work(rank):
        with (folder / f"out-{rank}").open("w") as out, (folder / f"err-{rank}").open("w") as err:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                return cli.main([str(argument) for argument in commands[rank]])

    folder.mkdir(exist_ok=True)
    statuses, errors = on_ranks(len(commands), folder, work)
    assert not errors, errors
    printed = [
        tuple((folder / f"{name}-{rank}").read_text() for name in ("out", "err")) for rank in range(len(commands))
    ]
    return statuses, printed
