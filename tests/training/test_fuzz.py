"""Damaged and hostile input: what hypothesis finds, and a few hundred cases of scripts/fuzz.py."""

import importlib.util
import json
import math
import random
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adazeta.errors import JournalError
from adazeta.journal_format import encode, header_bytes, parse
from adazeta.options import RUN, TRAIN, read_yaml
from adazeta.update import Step
from adazeta_kernels import fill_normal_, perturb_

spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.integers(0, 2**32 - 1)
records = st.builds(
    Step,
    index=st.just(0),
    lr=numbers,
    momentum=st.floats(0, 1, exclude_max=True),
    weight_decay=numbers,
    coefficients=st.lists(float32, max_size=20).map(tuple),
    loss=st.floats(),
    spread=st.floats(width=32, allow_nan=False),
    **{name: words for name in ("rows", "losses", "dropped", "clipped")},
    digest=st.none() | words,
)
FOLDER = tempfile.TemporaryDirectory()
JOURNAL = fuzz.Journals(Path(FOLDER.name))


@quick
@given(st.lists(records, max_size=5), st.data())
def test_any_steps_are_read_as_they_were_written_and_cut_anywhere(steps, data):
    content, chain = header_bytes(JOURNAL.header)
    for index, step in enumerate(steps):
        object.__setattr__(step, "index", index)
        record, chain = encode(step, chain)
        content += record
    found = parse(Path("x"), content)
    assert found.torn == 0 and len(found.steps) == len(steps)
    for ours, theirs in zip(steps, found.steps):
        for name in ("index", "lr", "momentum", "weight_decay", "spread", "rows", "losses", "digest", "back_to"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.loss == theirs.loss or math.isnan(ours.loss) and math.isnan(theirs.loss)
        assert np.array_equal(np.array(ours.coefficients, np.float32), theirs.coefficients)
    cut = data.draw(st.integers(found.ends[0], len(content)))
    left = parse(Path("x"), content[:cut])
    assert left.ends[-1] + left.torn == cut and left.ends[-1] == max(end for end in found.ends if end <= cut)


@quick
@given(st.integers(0, len(JOURNAL.whole) - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_journal_is_found(position, change):
    content = bytearray(JOURNAL.whole)
    content[position] ^= change
    with pytest.raises(JournalError) as caught:
        parse(Path("x"), bytes(content))
    offset = caught.value.offset
    ends = parse(Path("x"), JOURNAL.whole).ends
    # The record that holds the byte, or the header.
    assert offset == max([end for end in ends if end <= position], default=offset) and offset <= position + 12


@quick
@given(st.binary(max_size=400))
def test_settings_files_of_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_bytes(content)
    try:
        read_yaml(str(path), [*RUN, *TRAIN])
    except fuzz.UserError as error:
        assert str(path) in str(error)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({})
)


@quick
@given(anything, anything, anything, anything, anything)
def test_ops_refuse_or_do_what_any_arguments_ask_for(seed, scale, offset, decay, distribution):
    x = torch.zeros(5)
    for call in (
        lambda: fill_normal_(x, seed, offset=offset, distribution=distribution),
        lambda: fill_normal_(x, seed),
        lambda: perturb_([x], [seed], [scale], offset=offset, decay=decay),
        lambda: perturb_([x], seed, scale, distribution=distribution),
    ):
        before = x.clone()
        try:
            call()
        except (ValueError, TypeError):
            assert torch.equal(x, before)
        assert torch.isfinite(x).all() or math.isfinite(scale or 0.0)


@pytest.mark.parametrize(("name", "count"), [("journal", 2000), ("config", 150), ("ops", 400), ("adapter", 15)])
def test_cases_of_the_fuzz_script(name, count, tmp_path):
    accepted, refused = fuzz.fuzz(fuzz.TARGETS[name](tmp_path), count, random.SystemRandom().randrange(2**32))
    assert accepted + refused == count and refused


SITE = r"base model: base_model.model.model.layers.0.self_attn.o_proj.tt_theta has shape \[\d+\], "


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"bottleneck": 200_000_000},
            rf"{SITE}adapter_config.json asks for \[\d{{9}}\]",
        ),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.weight is missing, adapter_config.json asks for \[64, 32\]"),
        ({"peft_type": "LORA", "r": 100_000}, r"adapter_config.json: peft_type must be 'TT', got 'LORA'"),
        ({"peft_type": None}, r"adapter_config.json: peft_type must be 'TT', got None"),
        ({"target_modules": "all-linear"}, "target_modules must be plain names of modules, got 'all-linear'"),
        *(
            ({key: value}, rf"adapter_config.json: {key} must be plain names of modules, got .*\(\[a-z")
            for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
            for value in ("([a-z0-9._]+)+!", ["down_proj", "([a-z0-9._]+)+!"])
        ),
    ],
)
def test_an_adapter_is_checked_before_it_is_made(changes, message, tmp_path):
    target = fuzz.Adapters(tmp_path)
    settings = json.dumps({**target.settings, **changes}).encode()

    class One:
        def make(self, chance):
            return struct.pack("<I", len(settings)) + settings + target.weights

        def run(self, content):
            with pytest.raises(fuzz.UserError, match=message) as error, fuzz.Peak() as peak:
                target.run(content)
            assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
            assert not peak.exact or peak.bytes - before < 32 << 20
            raise error.value

    before = fuzz.resident_bytes()
    assert fuzz.fuzz(One(), 1, 0) == (0, 1)


def test_the_fuzz_script_tells_a_crash_and_wasted_memory():
    class Crashing:
        def make(self, chance):
            return struct.pack("<I", chance.getrandbits(8))

        def run(self, content):
            if content[0] > 100:
                raise KeyError("lost")

    class Wasteful(Crashing):
        cases = 0

        def run(self, content):
            self.cases += 1
            torch.ones(1 << 24 if self.cases == 200 else 1)

    with pytest.raises(AssertionError, match="case .* of seed 1: KeyError"):
        fuzz.fuzz(Crashing(), 100, 1)
    if fuzz.LINUX:
        with pytest.raises(AssertionError, match="case 199 of seed 1: .* bytes"):
            fuzz.fuzz(Wasteful(), 300, 1)


def test_the_journals_of_the_fuzz_script_are_replayed(tmp_path):
    target = fuzz.Journals(tmp_path)
    target.run(target.whole)
    in_place = {**target.header, "config": {**target.header["config"], "perturb": "in-place"}}
    target.run(target.content(in_place, target.steps))
    assert fuzz.replay(target.path).header == in_place
    record = target.content(target.header, [fuzz.Step(0, 0.1, 0.0, 0.0, (1.0,), digest=1)])
    with pytest.raises(JournalError, match="the numbers before step 0 differ"):
        target.run(record)


def test_aliases_and_depth_in_settings_files(tmp_path):
    path = tmp_path / "run.yaml"
    for content, message in (
        ("a: &a [1]\nb: *a\n", "aliases such as .a are not read"),
        ("steps: " + "[" * 5000 + "]" * 5000, "more than 10 levels at byte 1"),
    ):
        path.write_text(content)
        with pytest.raises(fuzz.UserError, match=message):
            read_yaml(str(path), TRAIN)


def test_a_width_without_end_is_refused_at_once():
    from adazeta_kernels import TTAdapterLayout

    for arguments in ((2**63, 64, 2), (4096, 2**63, 2)):
        with pytest.raises(ValueError, match="9223372036854775808 is too large for a TT shape, expected at most"):
            TTAdapterLayout.auto(*arguments)


def test_atheris_finds_no_failure_in_the_journal_reader(tmp_path):
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 and Python 3.11 to 3.13")
    script = Path(fuzz.__file__).with_name("fuzz_atheris.py")
    command = [sys.executable, str(script), "-runs=3000", "-max_len=8192", f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    covered = [int(count) for count in re.findall(r"cov: (\d+)", run.stderr)]
    assert covered[-1] > 100 and not list(tmp_path.iterdir())
