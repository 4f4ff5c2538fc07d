"""Write tests/kernels/vectors.json and the tables of docs/perturbation-spec.md from the reference implementation.

python scripts/write_vectors.py
"""

import json
from pathlib import Path

import numpy as np

from adazeta_kernels import derive_seed
from adazeta_kernels.backends.reference import rng

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 42, 0x0123456789ABCDEF, 2**63, 2**64 - 1)
INDICES = (0, 1, 2, 3, 4, 127, 128, 1000003, 2**32 - 1, 2**32, 2**34 - 1, 2**34, 2**34 + 5, 2**63 - 1)
DERIVED = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (42, 1000, 19), (2**64 - 1, 2**32, 2**32 - 1), (7, 2**64 - 1, 0))


def float_bits(x) -> str:
    return f"0x{int(np.float32(x).view(np.uint32)):08x}"


def vectors() -> dict:
    elements = [
        {
            "seed": seed,
            "index": index,
            "word": f"0x{int(rng.philox(seed, index // 4, 1)[0, index % 4]):08x}",
            "gaussian": float_bits(rng.gaussian(seed, index, 1)[0]),
            "rademacher": float_bits(rng.rademacher(seed, index, 1)[0]),
        }
        for seed in SEEDS
        for index in INDICES
    ]
    seeds = [
        {"run_seed": run, "step": step, "query": query, "seed": derive_seed(run, step, query)}
        for run, step, query in DERIVED
    ]
    return {"elements": elements, "seeds": seeds}


def table(rows: list[dict]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    data = vectors()
    lists = (f'  "{name}": [\n    ' + ",\n    ".join(map(json.dumps, rows)) + "\n  ]" for name, rows in data.items())
    (ROOT / "tests/kernels/vectors.json").write_text("{\n" + ",\n".join(lists) + "\n}\n")
    page = ROOT / "docs/perturbation-spec.md"
    before, rest = page.read_text().split("<!-- vectors -->")
    after = rest.split("<!-- end of vectors -->")[1]
    tables = "\n\n".join(table(rows) for rows in data.values())
    page.write_text(f"{before}<!-- vectors -->\n{tables}\n<!-- end of vectors -->{after}")


if __name__ == "__main__":
    main()
