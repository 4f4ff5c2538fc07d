"""Peak memory of one step above the model, measured in a process of its own.

    python benchmarks/step_memory.py '{"side": "ours", "model": "opt-125m", "dtype": "float32", "examples": 16, ...}'

Prints a JSON object. `measure` starts such a process, so that one side's allocations cannot serve the other.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent


def measure(**case) -> dict[str, object]:
    """Return `peak_bytes` above the loaded model and whether it is `exact`, of the step of `case` in a new process.

    Args:
        case: side ("ours" or "published"), model, dtype, examples, tokens, queries, threads, device, little.
    """
    paths = [str(HERE.parent), str(HERE.parent / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE / "step_memory.py"), json.dumps(case)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"measuring memory of {case} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(case: dict) -> dict[str, object]:
    import torch
    from step_engines import ADAPTER, LITTLE_ADAPTER, Ours, published, stored
    from step_models import build, make_batch

    from adazeta.memory import Peak, freed_memory_kept, resident_bytes

    torch.set_num_threads(case["threads"])
    on_gpu = case["device"] == "cuda"
    base = build(case["model"], stored(case["dtype"]), case["device"], case["little"])
    adapter = LITTLE_ADAPTER if case["little"] else ADAPTER
    with tempfile.TemporaryDirectory() as folder:
        if case["side"] == "ours":
            step = Ours(base, case["queries"], folder, adapter, case["dtype"]).step
        else:
            step = partial(published(base, adapter).step, seeds=range(case["queries"]))
        # Libraries set themselves up on the first call; a batch of one short row needs hardly any activations.
        step(make_batch(base, 1, 2))
        batch = make_batch(base, case["examples"], case["tokens"])
        if on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(batch)
            return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "exact": True}
        before = resident_bytes() or 0
        with freed_memory_kept(), Peak() as peak:
            step(batch)
        return {"peak_bytes": peak.bytes - before, "exact": peak.exact}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
