"""Kill training runs at random instants, resume them, and compare every bit with a run that was left alone.

    python scripts/soak.py --kills 200              # a small loop of its own: minutes
    python scripts/soak.py --kills 200 --command    # `adazeta train` itself, in processes forked from this one
    python scripts/soak.py --minutes 600            # for a night

A life of the process ends in one of these ways, drawn at random: SIGKILL by the clock; in the middle of writing a
record, after any number of its bytes; between a record and the update; before or after a file is renamed; at a full
disk (a limit on the size of files, so that writes really come out short). After every death the journal must begin with
the bytes of the undisturbed run's and hold every step that had returned; when a run is through, journal and adapter
must be the undisturbed run's. Exit status 1 if anything was lost or differs.
"""

import argparse
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "python"), str(ROOT / "tests" / "training")]

from adazeta import UserError, cli  # noqa: E402
from adazeta.journal import NAME, Journal, read  # noqa: E402
from adazeta.losses import lm_loss  # noqa: E402
from adazeta.optimizer import ZerothOrder  # noqa: E402
from adazeta.run_folders import resumable  # noqa: E402
from adazeta.runs import ADAPTER, is_run  # noqa: E402

WAYS = ("clock", "torn record", "before the update", "before a rename", "after a rename", "full disk")
EVERY = 5  # steps between checkpoints
CRASH = "crash.txt"  # why a life ended by itself


class Loop:
    """A small training loop of its own: a tiny Llama with TT adapters, a checkpoint every few steps."""

    def __init__(self, steps: int = 40):
        from tiny import lm_batch, tiny_adapted

        self.steps, self.seconds = steps, 0.0
        self.model = tiny_adapted(layers=1)  # made once: its children are forked
        self.batches = [lm_batch(4, seed=k) for k in range(steps)]

    def journal(self, folder: Path) -> Path:
        return folder / NAME

    def live(self, folder: Path, told) -> None:
        """Begin the run, or go on with it, to its end; ``told(steps)`` after every step that has returned."""
        optimizer = ZerothOrder(self.model, lr=0.1, eps=0.05, queries=2, momentum=0.9, weight_decay=0.1)
        theta, checkpoint = self.model.base_model.theta(), folder / "checkpoint.pt"
        resume = self.journal(folder).exists()
        if resume and checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            theta.copy_(saved["theta"])
            optimizer.load_state_dict(saved["optimizer"])
        journal = optimizer.write_journal(self.journal(folder), resume=resume)
        for k in range(optimizer.step_index, self.steps):
            optimizer.estimate(lm_loss, self.batches[k])
            optimizer.step()
            told(k + 1)
            if (k + 1) % EVERY == 0:
                save(checkpoint, {"theta": theta, "optimizer": optimizer.state_dict()})
        journal.close()
        save(folder / "theta.pt", theta)

    def finished(self, folder: Path) -> bool:
        return (folder / "theta.pt").exists()

    def result(self, folder: Path) -> tuple[bytes, bytes]:
        return self.journal(folder).read_bytes(), torch.load(folder / "theta.pt", weights_only=True).numpy().tobytes()


class Command:
    """``adazeta train`` on a tiny model, as people run it."""

    def __init__(self, world: Path):
        from tiny_run import write_data, write_model

        self.steps = 30
        write_model(world / "base")
        write_data(world / "data.jsonl")
        flags = f"--steps {self.steps} --batch-size 4 --queries 2 --rank 2 --bottleneck 8 --sites mlp --eval-limit 4"
        where = ["--model", str(world / "base"), "--data", str(world / "data.jsonl")]
        self.flags = ["train", *where, *flags.split(), "--save-every", str(EVERY), "--deterministic", "--debug"]

    def journal(self, folder: Path) -> Path:
        return folder / "run.partial" / NAME if (folder / "run.partial").exists() else folder / "run" / NAME

    def live(self, folder: Path, told) -> None:
        step = ZerothOrder.step

        def telling(optimizer, closure=None):
            step(optimizer, closure)
            told(optimizer.step_index)

        ZerothOrder.step = telling
        more = ["--resume"] if resumable(folder / "run.partial") else []
        status = cli.main([*self.flags, "--output", str(folder / "run"), *more])
        if status:
            raise UserError(f"exit status {status}")

    def finished(self, folder: Path) -> bool:
        return is_run(folder / "run") and not (folder / "run.partial").exists()

    def result(self, folder: Path) -> tuple[bytes, bytes]:
        return (folder / "run" / NAME).read_bytes(), (folder / "run" / ADAPTER).read_bytes()


def save(path: Path, value) -> None:
    """Write ``value`` aside, then rename."""
    from adazeta.files import disk_errors, replacing

    with replacing(path) as temporary, disk_errors(path):
        torch.save(value, temporary)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file whose process dies in a write, after the first bytes of it."""

    def __init__(self, file, chance: random.Random):
        self.file, self.chance = file, chance

    def write(self, data) -> None:
        self.file.write(data[: self.chance.randrange(len(data) + 1)])
        die()

    def __getattr__(self, name):
        return getattr(self.file, name)


def arrange(way: str, chance: random.Random, steps: int, journal: Path) -> None:
    """Let this process end in ``way``, at a step or rename drawn at random."""
    append, left = Journal.append, chance.randrange(steps)

    def torn(self, step):
        nonlocal left
        if left <= 0:
            self._file = Torn(self._file, chance)
        left -= 1
        append(self, step)

    def recorded(self, step):
        nonlocal left
        append(self, step)
        if left <= 0:
            die()
        left -= 1

    def dying(rename):
        def renaming(source, target, **keywords):
            nonlocal left
            if left <= 0 and way == "before a rename":
                die()
            rename(source, target, **keywords)
            if left <= 0:
                die()
            left -= 1

        return renaming

    if way == "torn record":
        Journal.append = torn
    elif way == "before the update":
        Journal.append = recorded
    elif way.endswith("rename"):
        left = chance.randrange(max(1, steps // EVERY))
        os.replace, os.rename, os.link = map(dying, (os.replace, os.rename, os.link))
    elif way == "full disk":
        size = (journal.stat().st_size if journal.exists() else 0) + chance.randrange(1, 88 * steps)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def live(run, folder: Path, acknowledged: mmap.mmap, way: str, seed: int, seconds: float) -> str:
    """Let one child train until it dies or is through; return how it ended."""
    folder.mkdir(exist_ok=True)
    chance = random.Random(seed)
    child = os.fork()
    if child == 0:
        status = 9
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            if way:
                arrange(way, chance, run.steps, run.journal(folder))
            run.live(folder, lambda steps: acknowledged.__setitem__(slice(0, 8), struct.pack("<Q", steps)))
            status = 0
        except BaseException as error:
            status = 2 if isinstance(error, UserError) else 9
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (folder.parent / CRASH).write_text(traceback.format_exc())
        finally:
            os._exit(status)
    if way == "clock":
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "through", 2: "refused", 9: "crashed", -signal.SIGKILL: "killed"}.get(status, f"status {status}")


def soak(run, work: Path, *, kills: int, minutes: float = 0.0, seed: int = 0, say=print) -> dict[str, int]:
    """Kill and resume until ``kills`` deaths or ``minutes`` are over; return what was counted."""
    acknowledged = mmap.mmap(-1, 8)
    start = time.monotonic()
    ending = live(run, work / "undisturbed", acknowledged, "", 0, 0.0)
    assert ending == "through", ending
    seconds = time.monotonic() - start
    expected = run.result(work / "undisturbed")
    chance = random.Random(seed)
    counts = {"deaths": 0, "runs": 0, "lost steps": 0, "differing": 0, "crashes": 0, **dict.fromkeys(WAYS, 0)}
    folder, until = work / "run-0", start + 60 * minutes
    acknowledged[:] = bytes(8)
    while (counts["deaths"] < kills or time.monotonic() < until) or folder.exists():
        enough = counts["deaths"] >= kills and time.monotonic() >= until
        way = "" if enough else chance.choice(WAYS)
        ending = live(run, folder, acknowledged, way, chance.getrandbits(32), 1.2 * seconds)
        told = struct.unpack("<Q", acknowledged)[0]
        path = run.journal(folder)
        found = read(path, repair=True) if path.exists() else None
        whole = path.read_bytes()[: found.ends[-1]] if found else b""
        counts["lost steps"] += max(0, told - len(found.steps) if found else told)
        counts["differing"] += not expected[0].startswith(whole)
        if ending == "crashed" or (ending == "refused" and way != "full disk"):
            counts["crashes"] += 1
            text = (work / CRASH).read_text() if (work / CRASH).exists() else ""
            say(f"seed {seed}: {way!r} in {folder} ended by itself ({ending})\n{text}")
            break
        if ending != "through":
            counts["deaths"] += 1
            counts[way] += 1
        if run.finished(folder):  # or killed after its last write
            counts["differing"] += run.result(folder) != expected
            counts["runs"] += 1
            shutil.rmtree(folder)
            acknowledged[:] = bytes(8)
            folder = work / f"run-{counts['runs']}"
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="deaths at least (default: 200)")
    parser.add_argument("--minutes", type=float, default=0, metavar="X", help="go on for so long (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default: 0)")
    parser.add_argument("--command", action="store_true", help="run `adazeta train` (default: a loop of its own)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # forked children of a process with a pool of threads would hang
    with tempfile.TemporaryDirectory() as work:
        run = Command(Path(work)) if arguments.command else Loop()
        start = time.monotonic()
        counts = soak(run, Path(work), kills=arguments.kills, minutes=arguments.minutes, seed=arguments.seed)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), f"({time.monotonic() - start:.0f} s)")
    return int(counts["lost steps"] + counts["differing"] + counts["crashes"] > 0)


if __name__ == "__main__":
    sys.exit(main())
