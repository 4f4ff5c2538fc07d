"""Feed damaged and hostile journals, adapters, settings and arguments to the readers, as many as asked for.

    python scripts/fuzz.py journal --count 1000000
    python scripts/fuzz.py adapter --count 100000
    python scripts/fuzz.py config --count 100000
    python scripts/fuzz.py ops --count 100000

A case passes when it is accepted, or refused by a ValueError, TypeError or UserError. Journals are read, where the
error names a byte or a key, and replayed. In one of a hundred cases resident memory is measured (Linux): it grows by 64
times the input's size and 32 MiB at most; none gets more than 4 GiB. A case that takes ten seconds of processor time,
or two minutes, counts as a hang. The first case that fails is printed with its seed; exit status 1.
"""

import argparse
import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "python"), str(ROOT / "tests" / "training"), str(ROOT / "scripts")]

from fuzz_ops import ODD, Operations  # noqa: E402

from adazeta import TTConfig, UserError, ZOConfig  # noqa: E402
from adazeta.digests import sha256_of  # noqa: E402
from adazeta.errors import JournalError  # noqa: E402
from adazeta.journal import INITIAL_NAME, NAME  # noqa: E402
from adazeta.journal_format import encode, header_bytes, parse  # noqa: E402
from adazeta.memory import Peak, resident_bytes  # noqa: E402
from adazeta.options import RUN, TRAIN, read_yaml, resolve, section  # noqa: E402
from adazeta.replay import rebuild_initial, replay  # noqa: E402
from adazeta.runs import ADAPTER, attach_adapter  # noqa: E402
from adazeta.update import Step  # noqa: E402
from adazeta_kernels import TTAdapterLayout  # noqa: E402

LINUX = sys.platform == "linux"
REFUSALS = (ValueError, TypeError, UserError)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return ``data`` with one to four changes: bits, bytes, parts cut out, doubled, zeroed, moved or cut off."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not data:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(40)))
        at = chance.randrange(len(data))
        length = min(len(data) - at, 1 << chance.randrange(8))
        kind = chance.randrange(8)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + length] = bytes(length)
        elif kind == 5:
            number = chance.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data)))
            data[at : at + 8] = struct.pack("<Q", number)[: max(0, len(data) - at)]
        elif kind == 6:
            data[at:at] = bytes(chance.randrange(256) for _ in range(length))
        else:
            del data[at:]
    return bytes(data)


def twist(value, chance: random.Random):
    """Return a JSON value with one entry replaced, taken out or added somewhere inside."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        value, key = dict(value), chance.choice(list(value))
        if chance.random() < 0.15:
            del value[key]
        elif chance.random() < 0.1:
            value["more"] = chance.choice(ODD)
        else:
            value[key] = twist(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.7:
        value, at = list(value), chance.randrange(len(value))
        value[at] = twist(value[at], chance)
        return value
    return chance.choice(ODD)


class Journals:
    """Journals with changed bytes, and well-formed ones that say what cannot be, of runs streamed and in place."""

    def __init__(self, work: Path):
        self.path = work / NAME
        layout = TTAdapterLayout.auto(32, 8, 2)
        init = {"init": "identity", "gain": 1.0, "seed": 3}
        self.header = {
            **{"version": 2, "run_seed": 5, "distribution": "gaussian", "init": init, "initial": "file"},
            "sites": [{"name": f"layer.{k}.tt_theta", "layout": layout.encode()} for k in range(2)],
            "params": [{"name": "head.weight", "shape": [4, 8], "decayed": True}],
            **{"base_sha256": "1" * 64, "adapter": {"rank": 2}, "about": {"task": {}}, "software": {"adazeta": "0"}},
            "config": {"eps": 0.01, "difference": "central", "perturb": "streamed"},
        }
        head = torch.ones(4, 8)
        self.header["initial_sha256"] = sha256_of([rebuild_initial(self.header), head])
        save_file({"head.weight": head}, work / INITIAL_NAME)
        self.steps = [Step(k, 0.1, 0.9, 0.01, (0.5, -0.25, 1.0), 0.7, 0.3, 12, 12) for k in range(3)]
        self.steps.append(Step(3, 0.1, 0.9, 0.01, (0.5, -0.25, 1.0), 0.7, 0.3, 12, 12, digest=5))
        self.steps.append(Step(4, 0.1, 0.9, 0.0, (), 0.7, 0.3, 12, 12, back_to=2))
        self.whole = self.content(self.header, self.steps)

    def content(self, header, steps) -> bytes:
        content, chain = header_bytes(header)
        for step in steps:
            record, chain = encode(step, chain)
            content += record
        return content

    def hostile(self, chance: random.Random) -> bytes:
        """A journal with right checksums and wrong content."""
        kind, header = chance.randrange(3), self.header
        if chance.random() < 0.5:
            header = {**header, "config": {**header["config"], "perturb": "in-place"}}
        if kind == 0:
            return self.content(twist(header, chance), self.steps)
        if kind == 1:
            body = mutate(json.dumps(header).encode(), chance)
            return b"AZJ2" + struct.pack("<II", len(body), zlib.crc32(body)) + body
        content, chain = header_bytes(header)
        for step in self.steps:  # records whose bytes were changed before they were summed up
            record, _ = encode(step, chain)
            head, body = bytearray(record[:72]), record[76:-4]
            if chance.random() < 0.4:
                head[chance.randrange(72)] = chance.randrange(256)
            if chance.random() < 0.3:
                body = mutate(body, chance)
            chain = zlib.crc32(head, chain)
            content += bytes(head) + struct.pack("<I", chain)
            chain = zlib.crc32(body, chain)
            content += body + struct.pack("<I", chain)
        return content

    def make(self, chance: random.Random) -> bytes:
        return mutate(self.whole, chance) if chance.random() < 0.5 else self.hostile(chance)

    def run(self, content: bytes) -> None:
        try:
            found = parse(self.path, content)
        except JournalError as error:
            assert isinstance(error, ValueError) and (error.offset is not None or error.key), error
            assert error.offset is None or 0 <= error.offset <= len(content), error
            raise
        assert found.ends[-1] + found.torn == len(content)
        assert all(step.index == k for k, step in enumerate(found.steps))
        assert self.content(found.header, found.steps)[:4] == content[:4]
        self.path.write_bytes(content)
        assert replay(self.path, repair=True).step == len(found.steps)


class Adapters:
    """Adapter folders whose numbers or settings were changed, loaded onto a tiny model."""

    def __init__(self, work: Path):
        from tiny import tiny_adapted, tiny_llama

        self.folder, self.model = work / "adapter", tiny_llama(layers=1)
        tiny_adapted(layers=1).save_pretrained(self.folder)
        self.weights = (self.folder / ADAPTER).read_bytes()
        self.settings = json.loads((self.folder / "adapter_config.json").read_text())

    def make(self, chance: random.Random) -> bytes:
        weights, settings = self.weights, json.dumps(self.settings).encode()
        if chance.random() < 0.7:
            weights = mutate(weights, chance)
        elif chance.random() < 0.8:
            settings = json.dumps(twist(self.settings, chance)).encode()
        else:
            settings = mutate(settings, chance)
        return struct.pack("<I", len(settings)) + settings + weights

    def run(self, content: bytes) -> None:
        end = 4 + struct.unpack_from("<I", content)[0]
        (self.folder / "adapter_config.json").write_bytes(content[4:end])
        (self.folder / ADAPTER).write_bytes(content[end:])
        attach_adapter(copy.deepcopy(self.model), self.folder)


class Configs:
    """YAML files of settings: changed bytes, odd values, deep and repeated structure."""

    def __init__(self, work: Path):
        self.path = work / "run.yaml"
        self.options = [*RUN, *TRAIN]
        self.whole = (
            b"model: base\nlabel-words: {0: terrible, 1: great}\ntemplate: '{text}'\noutput: runs/x\nsteps: 400\n"
            b"lr: 0.01\nqueries: adaptive:0.85,0.45,20\nmax-minutes: 10\nlayers: [1, 2]\nbias: false\n"
        )

    def make(self, chance: random.Random) -> bytes:
        kind = chance.randrange(4)
        if kind < 2:
            return mutate(self.whole, chance)
        if kind == 2:
            names = chance.sample(self.options, chance.randint(1, 5))
            values = {option.name: chance.choice((*ODD, option.default)) for option in names}
            return json.dumps(values, default=str).encode()
        depth = chance.choice((5, 30, 2000))
        open_, close = chance.choice(((b"[", b"]"), (b"{a: ", b"}"), (b"- ", b"")))
        bomb = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + k, 98 + k, b",".join([b"*%c" % (97 + k)] * 9)) for k in range(12)
        )
        return chance.choice((b"steps: " + open_ * depth + close * depth, bomb, bomb + b"layers: *m\n"))

    def run(self, content: bytes) -> None:
        self.path.write_bytes(content)
        values = resolve({}, self.options, from_file=read_yaml(str(self.path), self.options))
        preset = values["preset"]
        ZOConfig(**section("zo", values, preset))
        TTConfig(**section("tt", values, preset))


TARGETS = {"journal": Journals, "adapter": Adapters, "config": Configs, "ops": Operations}


def fuzz(target, count: int, seed: int, say=lambda line: None) -> tuple[int, int]:
    """Run ``count`` cases; return how many were accepted and refused.

    Raises:
        AssertionError: a case that failed, with the seed that makes it again.
    """
    accepted = refused = 0

    def late(*_):
        raise AssertionError("it took ten seconds of processor time, or two minutes")

    warnings.simplefilter("ignore")
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, late)
    start = time.monotonic()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        content = target.make(chance)
        measured = number % 100 == 99
        before = resident_bytes() if measured else 0
        # By the clock alone, a machine that is busy with other things would look like a hang.
        signal.setitimer(signal.ITIMER_PROF, 10)
        signal.alarm(120)
        try:
            with Peak() if measured else nullcontext() as peak:
                target.run(content)
            accepted += 1
        except REFUSALS as error:
            assert len(str(error)) < 4096, f"case {number} of seed {seed}: an error of {len(str(error))} letters"
            refused += 1
        except BaseException as error:
            raise AssertionError(f"case {number} of seed {seed}: {type(error).__name__}: {error}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        if measured and peak.exact and number > 100:  # the first ones fill caches
            grown = peak.bytes - before
            assert grown < 64 * len(content) + (32 << 20), f"case {number} of seed {seed}: {grown:,} bytes"
        if number % 10_000 == 9_999:
            say(f"{number + 1:,} cases, {accepted:,} accepted, {refused:,} refused, {time.monotonic() - start:.0f} s")
    return accepted, refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="cases (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all cases (default: 0)")
    arguments = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if LINUX else 0
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.RLIM_INFINITY))
    work = Path(tempfile.mkdtemp())
    start = time.monotonic()
    try:
        accepted, refused = fuzz(TARGETS[arguments.target](work), arguments.count, arguments.seed, print)
    except AssertionError as error:
        print(error)
        return 1
    finally:
        shutil.rmtree(work)
    seconds = time.monotonic() - start
    print(f"{arguments.target}: {arguments.count:,} cases, {accepted:,} accepted, {refused:,} refused, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
