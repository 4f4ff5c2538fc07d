"""Commands of the docs that take hours: programs take the flags that are printed, and selections pick tests.

Commands of `adazeta` and `torchrun` run as they are printed in tests/training; `pip install .` runs in
test_style_and_builds.py.
"""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
PROGRAM = r"[^\s`\"']+\.py"


def printed(pattern: str) -> list[str]:
    """The commands that begin so, of blocks and of running text, each once."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        found |= {" ".join(line.split(" #")[0].split()) for line in lines if re.search(pattern, line)}
    return sorted(found)


# Not fuzz_atheris.py: libFuzzer reads its flags, and runs until it is stopped.
PROGRAMS = printed(rf"(^|[ /])python (?!scripts/fuzz_atheris){PROGRAM}|torchrun .*benchmarks/{PROGRAM}")
SELECTIONS = printed(r"(^| )pytest .*-k |^[A-Z_= a-z]*make bench ")


class Parsed(Exception):
    """The arguments were read; nothing was done yet."""


@pytest.mark.parametrize("command", PROGRAMS)
def test_programs_take_the_flags_that_are_printed(command, monkeypatch):
    words = shlex.split(command)
    first = next(index for index, word in enumerate(words) if re.fullmatch(PROGRAM, word))
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *arguments):
        parse(self, *arguments)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", words[first:])
    monkeypatch.setattr(sys, "path", [str((ROOT / words[first]).parent), *sys.path])
    if {"-h", "--help"} & set(words):
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(words[first], run_name="__main__")
        assert ended.value.code == 0
    else:
        with pytest.raises(Parsed):
            runpy.run_path(words[first], run_name="__main__")


@pytest.mark.parametrize("command", SELECTIONS)
def test_selections_pick_something(command):
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    if "make" in words:
        selected = ["benchmarks", *shlex.split(settings.pop("PYTEST_ARGS", ""))]
    else:
        selected = words[words.index("pytest") + 1 :]
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *selected]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(collect, cwd=ROOT, env=environment | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_commands_were_found():
    assert len(PROGRAMS) > 10 and len(SELECTIONS) > 3
