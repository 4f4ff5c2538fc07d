"""What bounds a step of many ranks: measured parts of one step put into a model of up to 1,024 ranks.

    python benchmarks/cost_model.py --output benchmarks/results/cost_model.json --page docs/performance.md

Measured here, on one thread, in seconds of processor time: what a query's forwards cost a rank, what every step costs
it besides, and what an update costs per direction, with record and digest. Assumed: latency and bandwidth of networks.
Nothing is run on many machines.

For R ranks, Q queries a step, q = ceil(Q / R) of them on the busiest rank:

    step(R)    = fixed + q query + update + Q direction + gather(R)
    gather(R)  = (R - 1) (latency + (HEAD + 8 q) / bandwidth)          a ring, as gloo's all_gather

Efficiency is work done per rank and second against one rank alone: step(1) / step(R) where work grows with R (each rank
brings q queries of its own, or examples of its own), step(1) / (R step(R)) where Q is fixed and shared out.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "python")]

from adazeta import ZerothOrder  # noqa: E402
from adazeta.data import load_splits  # noqa: E402
from adazeta.distributed import _HEAD  # noqa: E402
from adazeta.options import TRAIN, resolve  # noqa: E402
from adazeta.prepare import new_classifier, settle, zo_config  # noqa: E402
from adazeta.report import machine, table  # noqa: E402

RANKS = [2**k for k in range(11)]
NETWORKS = {  # latency of a message in seconds, bytes a second
    "10 Gbit/s, 30 us": (30e-6, 1.25e9),
    "100 Mbit/s, 20 ms": (20e-3, 12.5e6),
}


@dataclass
class Parts:
    """Seconds of one thread.

    Args:
        fixed, query: of an estimate: ``fixed + queries * query``.
        update, direction: of a step's update, record and digest: ``update + directions * direction``.
        numbers: trained numbers.
        examples: of a rank's batch.
    """

    fixed: float
    query: float
    update: float
    direction: float
    numbers: int
    examples: int

    def step(self, ranks: int, queries: int, latency: float, bandwidth: float) -> dict[str, float]:
        """Return the seconds of each part of a step on ``ranks`` ranks that share ``queries``."""
        return self._step(ranks, queries, -(-queries // ranks), latency, bandwidth)

    def step_of_data(self, ranks: int, queries: int, latency: float, bandwidth: float) -> dict[str, float]:
        """Return them where each rank probes all ``queries`` on examples of its own."""
        return self._step(ranks, queries, queries, latency, bandwidth)

    def _step(self, ranks: int, queries: int, own: int, latency: float, bandwidth: float) -> dict[str, float]:
        return {
            "forwards": self.fixed + own * self.query,
            "update": self.update + queries * self.direction,
            "gather": (ranks - 1) * (latency + 8 * (_HEAD + own) / bandwidth),
        }


def line(small: int, large: int, seconds) -> tuple[float, float]:
    """Return intercept and slope of what takes ``seconds(n)``, from the medians of three at two sizes."""
    low, high = (statistics.median(seconds(size) for _ in range(3)) for size in (small, large))
    slope = max(0.0, (high - low) / (large - small))
    return max(0.0, low - small * slope), slope


def measure(model: str, examples: int) -> Parts:
    """Measure the parts on ``model`` with the default preset, directions shared by the batch."""
    torch.set_num_threads(1)
    own = {"model": model, "directions": "batch", "dtype": "float32", "gemm": "plain", "batch_size": examples}
    settings = settle(resolve({name: str(value) for name, value in own.items()}, TRAIN))
    classifier = new_classifier(settings, "default", print)
    texts = load_splits("movies", labels=list(settings["label_words"]))["train"][:examples]
    batch, loss = classifier.collator()(list(classifier.encode(texts))), classifier.loss()
    keywords = vars(zo_config(settings, "default")) | {"lr": 1e-9, "queries": 1}
    optimizer = ZerothOrder(classifier.model, **keywords)
    optimizer.estimate(loss, batch)  # warms up, and looks whether rows mix

    def estimate(queries: int) -> float:
        optimizer.zero_grad()
        optimizer.queries = lambda *_: queries
        start = time.thread_time()
        optimizer.estimate(loss, batch)
        return time.thread_time() - start

    fixed, query = line(2, 8, estimate)

    def step(directions: int) -> float:
        optimizer.zero_grad()
        optimizer._projected = [torch.randn(directions, dtype=torch.float64)]
        start = time.thread_time()
        optimizer.step()
        return time.thread_time() - start

    optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        optimizer.write_journal(Path(folder) / "journal.azj")
        step(8)
        update, direction = line(64, 4096, step)
        optimizer.journal.close()
    return Parts(fixed, query, update, direction, optimizer.trainable().numel, examples)


def scenarios(parts: Parts, queries: int) -> list[dict]:
    """Return the ways of sharing a step out: name, the step's parts for R ranks, and whether work grows with R."""
    found = []
    for network, (latency, bandwidth) in NETWORKS.items():
        over = {"latency": latency, "bandwidth": bandwidth}
        found += [
            {
                "name": f"{queries} queries on each rank; {network}",
                "step": lambda ranks, over=over: parts.step(ranks, queries * ranks, **over),
                "growing": True,
            },
            {
                "name": f"{parts.examples} examples on each rank, {queries} queries; {network}",
                "step": lambda ranks, over=over: parts.step_of_data(ranks, queries, **over),
                "growing": True,
            },
            {
                "name": f"{16 * queries} queries shared out; {network}",
                "step": lambda ranks, over=over: parts.step(ranks, 16 * queries, **over),
                "growing": False,
            },
        ]
    fast = replace(parts, fixed=parts.fixed / 100, query=parts.query / 100)
    over = dict(zip(("latency", "bandwidth"), next(iter(NETWORKS.values()))))
    name = f"{queries} queries on each rank, forwards 100 times as fast; {next(iter(NETWORKS))}"
    return [*found, {"name": name, "step": lambda ranks: fast.step(ranks, queries * ranks, **over), "growing": True}]


def rows_of(scenario: dict) -> list[dict]:
    """Return the model's line for each number of ranks."""
    alone = sum(scenario["step"](1).values())
    rows = []
    for ranks in RANKS:
        parts = scenario["step"](ranks)
        seconds = sum(parts.values())
        efficiency = alone / seconds if scenario["growing"] else alone / (ranks * seconds)
        rows.append({"ranks": ranks, **parts, "step": seconds, "efficiency": efficiency})
    return rows


def falls_below(scenario: dict, share: float = 0.9) -> int | None:
    """Return the smallest number of ranks, up to 1,024, whose efficiency is below ``share``, and that of all beyond."""
    alone, last = sum(scenario["step"](1).values()), None
    for ranks in range(RANKS[-1], 1, -1):
        seconds = sum(scenario["step"](ranks).values())
        if (alone / seconds if scenario["growing"] else alone / (ranks * seconds)) >= share:
            return last
        last = ranks
    return last


def report(parts: Parts, found: list[dict]) -> str:
    """Return the tables of the page, in Markdown."""
    lines = [
        f"Measured: {1e3 * parts.fixed:.0f} ms a step and {1e3 * parts.query:.1f} ms a query ({parts.examples} "
        f"prompts); {1e3 * parts.update:.2f} ms and {1e6 * parts.direction:.1f} us a direction\nfor the update of "
        f"{parts.numbers:,} numbers, its record and digest.",
        "",
        "| work and network | efficiency at 8, 64, 1,024 ranks | below 90 % from | what bounds a step at 1,024 |",
        "| --- | --- | --- | --- |",
    ]
    for scenario in found:
        rows = {row["ranks"]: row for row in rows_of(scenario)}
        shares = ", ".join(f"{rows[ranks]['efficiency']:.0%}" for ranks in (8, 64, 1024))
        first, last = falls_below(scenario), rows[1024]
        cost = ", ".join(f"{name} {1e3 * last[name]:,.0f} ms" for name in ("forwards", "update", "gather"))
        where = f"{first:,} ranks" if first else "not up to 1,024"
        lines.append(f"| {scenario['name']} | {shares} | {where} | {cost} |")
    return "\n".join(lines)


def draw(found: list[dict], path: Path) -> None:
    """Draw efficiency against ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, scenario in enumerate(found):
        rows = rows_of(scenario)
        style = ("-", "--", ":")[index // 3]
        points = [row["ranks"] for row in rows], [row["efficiency"] for row in rows]
        axes.plot(*points, style, color=f"C{index % 3}", label=scenario["name"])
    axes.axhline(0.9, color="0.6", linewidth=0.8)
    axes.set(xscale="log", xlabel="ranks", ylabel="efficiency", ylim=(0, 1.05), title="A model, from measured parts")
    axes.set_xticks(RANKS, [f"{ranks:,}" for ranks in RANKS])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="base model (default: smollm2)")
    parser.add_argument("--examples", type=int, default=16, metavar="N", help="of a rank's batch (default: 16)")
    parser.add_argument("--queries", type=int, default=16, metavar="N", help="of one rank (default: 16)")
    parser.add_argument("--parts", type=Path, metavar="FILE", help="take the parts measured in this result")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write parts and model here, as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write table and plot into this page")
    arguments = parser.parse_args()
    if arguments.parts:
        parts = Parts(**json.loads(arguments.parts.read_text())["parts"])
    else:
        parts = measure(arguments.model, arguments.examples)
    found = scenarios(parts, arguments.queries)
    for scenario in found:
        print(scenario["name"])
        shown = [("ranks", "forwards, ms", "update, ms", "gather, ms", "step, ms", "efficiency")]
        for row in rows_of(scenario):
            times = [f"{1e3 * row[name]:.3g}" for name in ("forwards", "update", "gather", "step")]
            shown.append((f"{row['ranks']:,}", *times, f"{row['efficiency']:.1%}"))
        print(table(shown) + "\n")
    text = report(parts, found)
    if arguments.output:
        model = {scenario["name"]: rows_of(scenario) for scenario in found}
        result = {"parts": asdict(parts), "networks": NETWORKS, "model": model, "machine": machine()}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.page:
        page, (first, last) = arguments.page.read_text(), ("<!-- cost model -->\n", "<!-- end cost model -->")
        before, _, rest = page.partition(first)
        arguments.page.write_text(f"{before}{first}{text}\n{last}{rest.partition(last)[2]}")
        draw(found, arguments.page.parent / "images" / "scaling-model.png")


if __name__ == "__main__":
    main()
