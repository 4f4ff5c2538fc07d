"""Write the tables of docs/performance.md from the JSON of `make bench`.

    python benchmarks/report.py [RESULT.json ...] [PAGE.md]

By default of the newest result under benchmarks/results, into docs/performance.md. Of several results all cases are
taken together; of a case that is in more than one, the last.
What stands between `<!-- NAME -->` and `<!-- end NAME -->` is replaced, for NAME machine and those of `COLUMNS`;
everything else on the page is written by hand. A table is replaced whole, for the line above it says where and when its
rows were taken: results that lack one of them are refused. Whole steps also make a plot beside the page,
`images/step-cost.png` (for a page `performance-NAME.md` `images/step-cost-NAME.png`).
"""

import argparse
import json
import sys
from pathlib import Path

from step_plot import draw_step_cost

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


def milliseconds(value):
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


times, decimals = "{:.1f}x".format, "{:.2f}x".format
share, percent = "{:.2f} %".format, "{:.0f} %".format
error = "{:.1e}".format

# Heading, key of extra_info, how it is written.
THREADS = ("threads", "threads", str)
COMMON = [
    THREADS,
    ("native, ms", "native_ms", milliseconds),
    ("copy, GB/s", "copy_gb_per_s", "{:.1f}".format),
    ("of copy", "percent_of_copy", percent),
]
TORCH_MS, TIMES_TORCH = ("torch, ms", "torch_ms", milliseconds), ("against torch", "times_torch", times)
ERRORS = [("error", "error", error), ("torch's error", "torch_error", error)]
GEMM, APART = ("GEMM", "gemm", str), ("losses apart", "apart", error)
COLUMNS = {
    "perturb_": [
        *COMMON,
        ("of in place", "percent_of_in_place", percent),
        TORCH_MS,
        TIMES_TORCH,
        ("against one seed a pass", "times_one_by_one", times),
        ("one tensor, ms", "one_tensor_ms", milliseconds),
    ],
    "tt_factors": [*COMMON, TORCH_MS, TIMES_TORCH, ("reference, ms", "reference_ms", milliseconds), *ERRORS],
    "tt_adapter": [
        ("dtype", "dtype", str),
        *COMMON,
        ("against reference", "times_reference", times),
        TIMES_TORCH,
        *ERRORS,
    ],
    "step": [
        THREADS,
        GEMM,
        *((f"{side}, ms", f"{side}_ms", milliseconds) for side in ("published", "ours", "floor")),
        ("against published", "times_published", decimals),
        ("its head at one position", "times_published_scored", decimals),
        ("of floor", "percent_of_floor", percent),
        *((f"{what}/s", f"{what}_per_s", milliseconds) for what in ("rows", "tokens")),
        ("peak, MiB", "peak_ours_mib", milliseconds),
        ("published's peak", "peak_published_mib", milliseconds),
        APART,
    ],
    "step_split": [
        THREADS,
        *((name, f"split_{name}", share) for name in ("base", "adapters", "factors", "head", "update", "journal")),
        ("host", "split_host", share),
        ("adapters, factors, update, journal", "split_own", share),
    ],
    "padding": [
        ("processed tokens", "processed", str),
        ("real tokens", "real", str),
        ("processed / real", "over", "{:.3f}".format),
    ],
    "upper_quarter": [
        THREADS,
        GEMM,
        ("step, ms", "upper_ms", milliseconds),
        ("nothing kept, ms", "nothing_kept_ms", milliseconds),
        ("adapters in all blocks, ms", "all_ms", milliseconds),
        ("of that", "percent_of_all", percent),
        APART,
    ],
}
COLUMNS["step_grid"] = [column for column in COLUMNS["step"] if "peak" not in column[1]]
#: Tables of another op's benchmarks.
SOURCE = {"step_split": "step"}


def op_of(benchmark):
    return benchmark["extra_info"].get("op", "perturb_")


def case_of(benchmark):
    name = benchmark["name"].removeprefix("bench_")
    return benchmark["extra_info"].get("case") or name.replace("torch.", "").replace("-threads", " threads")


def table(benchmarks, columns):
    """A Markdown table of one row per benchmark, without the columns that no row has."""
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    columns = [column for column in columns if any(column[1] in info for info in infos)]
    rows = [["case", *(heading for heading, _, _ in columns)], ["---"] * (len(columns) + 1)]
    for benchmark, info in zip(benchmarks, infos, strict=True):
        cells = [write(info[key]) if key in info else "" for _, key, write in columns]
        rows.append([f"`{case_of(benchmark)}`", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine(results):
    """Device, versions and load in one line.

    Raises:
        ValueError: the results come from different processors.
    """
    infos = [benchmark["extra_info"] for result in results for benchmark in result["benchmarks"]]
    cpus = {result["machine_info"]["cpu"]["brand_raw"] for result in results}
    if len(cpus) > 1:
        raise ValueError(f"expected results of one kind of processor, got {', '.join(sorted(cpus))}")
    about = results[-1]["machine_info"]
    commits = [
        result["commit_info"]["id"][:7] + " with local changes" * bool(result["commit_info"].get("dirty"))
        for result in results
    ]
    loads = [info["load_average"] for info in infos]
    # The benchmark itself is a load of as many as it has threads.
    busy = any(info["load_average"] >= info["threads"] + 0.5 for info in infos)
    note = " **Other programs were running: take times as upper bounds, and ratios as rough.**" if busy else ""
    cpu = f"{about['cpu']['brand_raw']} (family {about['cpu'].get('family')}), {about['cpu']['count']} cores"
    return (
        f"{cpu}, {infos[0]['levels'][0]} kernels; torch "
        f"{infos[0]['torch']}, Python {about['python_version']}; commit {', '.join(dict.fromkeys(commits))}; "
        f"{results[-1]['datetime'][:16]} UTC; load average {min(loads):.1f} to {max(loads):.1f}.{note}"
    )


def together(results):
    """The benchmarks of all results; of one that several have, the last, in the place of the first."""
    return list({(op_of(b), b["name"]): b for result in results for b in result["benchmarks"]}.values())


def replace(page, name, text):
    """The page with `text` between the markers of `name`.

    Raises:
        ValueError: the page has not exactly one pair of them, or a table there has rows that `text` lacks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one {begin} and one {end} in {PAGE.name}")
    before, rest = page.split(begin)
    old, after = rest.split(end)
    if lost := cases_in(old) - cases_in(text):
        raise ValueError(
            f"the results lack rows of the table {name}: {', '.join(sorted(lost))}; name the files that hold them too, "
            "or take the rows of cases that are gone off the page"
        )
    return f"{before}{begin}\n{text}\n{end}{after}"


def cases_in(text):
    """What tells the rows of a table apart: case, dtype and threads."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    headings = rows[0] if rows else []
    columns = [headings.index(name) for name in ("case", "dtype", "threads") if name in headings]
    return {" ".join(row[column] for column in columns) for row in rows[2:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results (.json) and the page (.md)")
    named = parser.parse_args().files
    pages = [path for path in named if path.suffix == ".md"]
    paths = [path for path in named if path.suffix != ".md"]
    if not paths:
        found = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            sys.exit("no results found: run `make bench` first, or name a JSON file")
        paths = found[-1:]
    results = [json.loads(path.read_text()) for path in paths]
    target = pages[-1] if pages else PAGE
    every = together(results)
    try:
        page = replace(target.read_text(), "machine", machine(results))
        for op, columns in COLUMNS.items():
            benchmarks = [benchmark for benchmark in every if op_of(benchmark) == SOURCE.get(op, op)]
            if benchmarks:
                page = replace(page, op, table(benchmarks, columns))
    except ValueError as error:
        sys.exit(f"{target.name} stays as it is: {error}")
    target.write_text(page)
    steps = [benchmark["extra_info"] for benchmark in every if op_of(benchmark).startswith("step")]
    if steps:
        draw_step_cost(steps, target.parent / "images" / f"{target.stem.replace('performance', 'step-cost')}.png")


if __name__ == "__main__":
    main()
