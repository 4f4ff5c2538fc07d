"""Behind which block a head should read: where the mean of the frozen model's hidden states tells classes apart best.

The upper blocks of an encoder serve what it was trained for; what another task needs is often clearer below them, and
a model without them is smaller and faster. For every block, the logistic regression on the means of its hidden states
(:mod:`adazeta.head_start`) is judged on examples left out, all from one pass over the examples.

Source: Liu et al. (2019), *Linguistic Knowledge and Transferability of Contextual Representations* (arXiv 1903.08855),
which compares the layers of frozen encoders by linear classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adazeta.batches import to_device
from adazeta.data import row_tokens
from adazeta.errors import UserError
from adazeta.forwards import forward_of
from adazeta.head_start import FOLDS, MOST_ROWS, best_penalty
from adazeta.progress import progress_bar
from adazeta.scoring import language_model
from adazeta.tasks import HeadTask


def settle_depth(
    settings: Mapping[str, Any], examples: Sequence[Any], preset: str, say=lambda line: None
) -> dict[str, Any]:
    """Return the settings with a number for ``depth``, where that is ``auto`` and the task has a head.

    With fewer examples than a comparison takes it is None, all blocks.

    Raises:
        UserError: a private run, which would show something of its examples.
    """
    from adazeta.prepare import is_private, new_classifier

    if settings["depth"] != "auto" or settings["task"] != HeadTask.kind:
        return dict(settings)
    if is_private(settings):
        raise UserError("--depth auto looks at the data without noise: give a private run a number")
    if len(examples) < FOLDS:
        say(f"all blocks run: --depth auto compares them by {FOLDS} examples at least, got {len(examples)}")
        return {**settings, "depth": None}
    whole = new_classifier({**settings, "depth": None, "gemm": "plain"}, preset, lambda line: None)
    with progress_bar(min(len(examples), MOST_ROWS), "depth", "rows") as bar:
        losses = losses_by_depth(whole, examples, batch_size=settings["eval_batch_size"], progress=bar.update)
    depth = 1 + losses.index(min(losses))
    say(
        f"depth {depth} of {len(losses)} blocks: a head on the mean behind it has loss {min(losses):.3f} on examples "
        f"left out, {losses[-1]:.3f} behind the last"
    )
    return {**settings, "depth": depth}


@torch.no_grad()
def losses_by_depth(
    classifier, examples: Sequence[Any], *, batch_size: int = 32, progress=lambda rows: None
) -> list[float]:
    """Return, for each block, the mean loss on left-out examples of the best regression on the means behind it.

    Args:
        classifier: of a :class:`adazeta.heads.Pooled`; its adapter is the identity.
        examples: labelled, ``FOLDS`` at least; the first ``MOST_ROWS`` count.
        batch_size: rows of a forward.
        progress: told of the rows that are done.
    """
    rows = classifier.encode(examples[:MOST_ROWS])
    model, means, labels = language_model(classifier.model), None, torch.empty(len(rows), dtype=torch.int64)
    device = next(model.parameters()).device

    def keep(forward, **inputs):
        nonlocal means
        found = forward(**inputs, output_hidden_states=True)
        real = inputs["attention_mask"].unsqueeze(-1).to(found.last_hidden_state.dtype)
        of_blocks = [(states * real).sum(1) / real.sum(1) for states in found.hidden_states[1:]]
        means = [torch.empty(len(rows), mean.shape[1]) for mean in of_blocks] if means is None else means
        for mean, of_block in zip(means, of_blocks, strict=True):
            mean[part] = of_block.float().cpu()
        return found

    loss, collate = classifier.loss(), classifier.collator()
    order = sorted(range(len(rows)), key=lambda index: row_tokens(rows[index]))  # little padding
    with forward_of(model.encoder, keep):
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            batch = collate([rows[index] for index in part])
            loss.scores(classifier.model, to_device(batch, device))
            labels[part] = batch["labels"]
            progress(len(part))
    return [best_penalty(features, labels, len(classifier.task.labels))[1] for features in means]
