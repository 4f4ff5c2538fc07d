"""Write the table of compiled Triton kernels in docs/performance.md.

    python tests/kernels/triton_backend/aot.py --resources benchmarks/results/compiled/triton.json     compiles: hours
    python benchmarks/report_compiled.py [RESULT.json [PAGE.md]]

What stands between `<!-- triton_compiled -->` and its end is replaced: a line per kernel and padded rank, with the most
that any of its variants takes.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULT = ROOT / "benchmarks" / "results" / "compiled" / "triton.json"


def group_of(name):
    """The kernel and its padded rank, of the name of a variant."""
    kernel, *rest = name.split()
    return " ".join([kernel, *(word.replace("=", " ") for word in rest if re.match("rank=", word))])


def table(kernels):
    """A Markdown table of registers, spilled bytes and shared memory, per group and target."""
    targets = list(dict.fromkeys(kernel["target"] for kernel in kernels))
    lines = [["kernel", "variants", *targets, "spilled"], ["---"] * (len(targets) + 3)]
    for group in dict.fromkeys(group_of(kernel["name"]) for kernel in kernels):
        members = [kernel for kernel in kernels if group_of(kernel["name"]) == group]
        cells = [f"`{group}`", str(len({kernel["name"] for kernel in members}))]
        for target in targets:
            here = [kernel for kernel in members if kernel["target"] == target]
            registers, shared = (max(kernel[what] for kernel in here) for what in ("registers", "shared"))
            cells.append(f"{registers}, {shared / 1024:.0f} KiB")
        lines.append([*cells, str(sum(kernel["spills"] for kernel in members))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(result):
    """The table and where it comes from."""
    changed = " with local changes" if result["changed_files"] else ""
    versions = f"Triton {result['triton']}, ptxas {result['ptxas']} and {result['ptxas_blackwell']}"
    count = len(result["kernels"])
    return (
        f"{count} compiled kernels: {versions}; commit {result['commit'][:7]}{changed}.\n\n{table(result['kernels'])}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    parser.add_argument("page", nargs="?", type=Path, default=PAGE)
    given = parser.parse_args()
    result, page = given.result, given.page
    found, begin, end = page.read_text(), "<!-- triton_compiled -->", "<!-- end triton_compiled -->"
    if found.count(begin) != 1 or found.count(end) != 1:
        sys.exit(f"expected one {begin} and one {end} in {page}")
    before, rest = found.split(begin)
    page.write_text(f"{before}{begin}\n{text(json.loads(result.read_text()))}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
