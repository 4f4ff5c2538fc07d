"""``adazeta demo``: SmolLM2-135M learns to judge movie sentences, by forward passes alone, and shows what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adazeta.batches import to_device
from adazeta.memory import MIB, Peak
from adazeta.report import before_after, facts, table, training_facts
from adazeta.runs import Classifier


def measure_memory(
    classifier: Classifier, examples: Sequence, settings: Mapping[str, Any], preset: str, model_bytes: int
) -> dict:
    """Compare the peak memory of one estimate with that of a frozen forward of the same rows.

    The batch is made of the longest prompts. Both are run once before they are measured, so that buffers which stay
    are counted in neither, and measured twice: what the allocator happens to hold can only add, so the lower mark
    counts. ``theta`` is not touched.

    Args:
        model_bytes: resident memory with the model loaded and nothing run yet.

    Returns:
        Bytes above the loaded model: ``frozen_bytes``, ``estimate_bytes``, ``over_frozen_bytes`` (their difference),
        ``allowed_bytes`` (5 % of the frozen peak, plus 16 MiB); and whether the numbers are ``exact``.
    """
    import torch

    from adazeta import ZerothOrder
    from adazeta.prepare import zo_config

    prompts = classifier.encode(examples).by_length()
    device = next(classifier.model.parameters()).device
    rows = [prompts[index] for index in range(min(len(prompts), settings["batch_size"]))]
    batch = to_device(classifier.collator()(rows), device)
    loss = classifier.loss()
    recorder = _Recorder(loss)
    optimizer = ZerothOrder(classifier.model, **vars(zo_config(settings, preset)))

    def frozen():
        with torch.no_grad(), classifier.model.disable_adapter():
            for rows in recorder.forwards:
                loss(classifier.model, rows)

    optimizer.estimate(recorder, batch)
    frozen()
    peaks: dict[str, list[Peak]] = {"frozen": [], "estimate": []}
    for _ in range(2):
        with Peak() as peak:
            frozen()
        peaks["frozen"].append(peak)
        optimizer.zero_grad()
        with Peak() as peak:
            optimizer.estimate(loss, batch)
        peaks["estimate"].append(peak)
    optimizer.zero_grad()
    frozen_bytes, estimate_bytes = (min(peak.bytes for peak in found) - model_bytes for found in peaks.values())
    return {
        "frozen_bytes": frozen_bytes,
        "estimate_bytes": estimate_bytes,
        "over_frozen_bytes": estimate_bytes - frozen_bytes,
        "allowed_bytes": int(0.05 * frozen_bytes) + 16 * MIB,
        "exact": all(peak.exact for found in peaks.values() for peak in found),
    }


class _Recorder:
    """A loss that keeps the rows of every forward it is asked for."""

    def __init__(self, loss):
        self.loss, self.forwards = loss, []
        self.rows_per_example = loss.rows_per_example

    def __call__(self, model, batch):
        self.forwards.append(batch)
        return self.loss(model, batch)

    def losses_at_copies(self, model, batch, *arguments):
        self.forwards.append(batch)
        return self.loss.losses_at_copies(model, batch, *arguments)


def closing_table(summary: Mapping[str, Any]) -> str:
    """Return what the demo ends with: accuracy and loss, cost, size, and a few sentences."""
    count = summary["splits"]
    rows = [
        (f"{count[name]:,} {word} sentences", summary[name]["before"], summary[name]["after"])
        for name, word in (("test", "held-out"), ("dev", "dev"))
        if summary.get(name)
    ]
    parts = [before_after(rows)] if rows else []
    parts.append(facts(training_facts(summary)))
    if summary["sentences"]:
        lines = [("held-out sentence", "truth", "before", "after")]
        for entry in summary["sentences"]:
            text = entry["text"] if len(entry["text"]) <= 72 else entry["text"][:69] + "..."
            answers = [f"{entry[when]['label']} {entry[when]['probability']:.2f}" for when in ("before", "after")]
            lines.append((text, entry["label"], *answers))
        parts.append(
            table(lines) + "\n(the first three sentences whose answer changed, then the first two whose did not)"
        )
    return "\n\n".join(parts)


def shown_sentences(
    classifier: Classifier, examples: Sequence, measured: Mapping[str, Mapping[str, Any]]
) -> list[dict]:
    """Pick sentences by rule, not by taste: the first three whose answer changed, then the first two that did not."""
    labels = classifier.task.labels
    if labels is None:  # answers, not classes
        return []
    before, after = measured["before"], measured["after"]
    pairs = list(zip(before["predictions"], after["predictions"]))
    changed = [index for index, (old, new) in enumerate(pairs) if old != new][:3]
    same = [index for index, (old, new) in enumerate(pairs) if old == new][: 5 - len(changed)]

    def answer(result, index):
        prediction = result["predictions"][index]
        return {
            "label": labels[prediction],
            "probability": result["probabilities"][index][prediction],
        }

    return [
        {
            "text": examples[index].text,
            "label": examples[index].label,
            "before": answer(before, index),
            "after": answer(after, index),
        }
        for index in changed + same
    ]
