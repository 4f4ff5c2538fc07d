"""Fuzz the journal reader by coverage: atheris changes journals so that they reach new lines of the reader.

    pip install atheris
    python scripts/fuzz_atheris.py -runs=100000
    python scripts/fuzz_atheris.py -max_total_time=3600 corpus/    # libFuzzer's options; a corpus that is kept

An input is a byte and a journal: an even byte has the journal's checksums put right, so that changes get behind them.
What counts as a failure is what does in `scripts/fuzz.py journal`; libFuzzer then writes the input to a file and exits
with a status above 0.
"""

import random
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "python"), str(ROOT / "scripts")]

with atheris.instrument_imports(include=["adazeta.journal_format", "adazeta.update"]):
    import adazeta.journal_format  # noqa: F401

from fuzz import REFUSALS, Journals  # noqa: E402

#: Bytes before the body of the header and of a record, the checksum last.
HEADER, RECORD = 12, 76


def mend(content: bytes) -> bytes:
    """Return a journal with the checksums that its other bytes ask for, as far as it goes."""
    data = bytearray(content)

    def checked(begin: int, end: int, at: int, chain: int) -> int:
        chain = zlib.crc32(data[begin:end], chain)
        if at + 4 <= len(data):
            struct.pack_into("<I", data, at, chain)
        return chain

    if len(data) < HEADER:
        return content
    at = HEADER + struct.unpack_from("<I", data, 4)[0]
    chain = checked(HEADER, at, 8, 0)
    while at + RECORD <= len(data):
        chain = checked(at, at + RECORD - 4, at + RECORD - 4, chain)
        end = at + RECORD + 4 * struct.unpack_from("<I", data, at + RECORD - 8)[0]
        chain = checked(at + RECORD, end, end, chain)
        at = end + 4
    return bytes(data)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Journals(Path(folder))
        assert mend(target.whole) == target.whole
        seeds = Path(folder, "seeds")
        seeds.mkdir()
        for number in range(32):
            content = target.whole if number < 2 else target.hostile(random.Random(number))
            (seeds / str(number)).write_bytes(bytes([number % 2]) + content)

        def case(data: bytes) -> None:
            try:
                target.run(data[1:] if data[:1] and data[0] % 2 else mend(data[1:]))
            except REFUSALS:
                return

        atheris.Setup([*sys.argv, str(seeds)], case)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
