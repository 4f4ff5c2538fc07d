"""What a task is trained towards and measured by, where that is not its loss: names, or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adazeta.errors import UserError
from adazeta.own_function import OwnFunction, is_function, load_function
from adazeta.tasks import ChoiceTask, CompletionTask, Task


@dataclass(frozen=True)
class Measures:
    """The metrics of a task besides loss and accuracy.

    Args:
        task: answers are generated for a completion, any other task has classes.
        tokenizer: the model's.
        names: ``"f1"`` and ``"exact-match"``.
        function: a function of one's own, measured as ``score``.
        max_new_tokens: most tokens of an answer.

    Raises:
        UserError: a name that the task cannot have.
    """

    task: Task
    tokenizer: Any
    names: tuple[str, ...] = ()
    function: OwnFunction | None = None
    max_new_tokens: int = 32

    def __post_init__(self):
        for name in self.names:
            check_metric(self.task.kind, name)

    @property
    def scores(self) -> dict[str, str | Callable]:
        """Every score by its key in metrics.jsonl and summary.json."""
        named = {name.replace("-", "_"): name for name in self.names}
        return {**named, "score": self.function} if self.function else named

    @property
    def generates(self) -> bool:
        """Whether answers have to be generated."""
        return self.task.kind == CompletionTask.kind and bool(self.scores)

    def __call__(
        self,
        model,
        rows: Sequence[Mapping],
        predictions: Sequence[int],
        collate: Callable[[list], dict],
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, float]:
        """Return the mean of every score over encoded examples.

        Args:
            model: what answers.
            rows: the examples, those of similar length together.
            predictions: their predicted classes; a completion's are not looked at.
            collate: makes a batch of a list of examples.
            batch_size: examples that generate together.
            progress: called with the number of examples that have answered since the last call.
        """
        if not self.generates:
            return self._of_classes(rows, predictions)
        from adazeta.batches import to_device

        found, device = [], next(model.parameters()).device
        for first in range(0, len(rows), batch_size):
            part = [rows[index] for index in range(first, min(first + batch_size, len(rows)))]
            found += self._of_answers(model, to_device(collate(part), device))
            if progress is not None:
                progress(len(part))
        return {name: sum(values) / len(rows) for name, values in zip(self.scores, zip(*found))}

    def _of_answers(self, model, batch: Mapping[str, Any]) -> list[list[float]]:
        from adazeta.generation import generate_answers, prompts_of, texts_of
        from adazeta.objectives import rate, references_of

        references = references_of(self.tokenizer, batch)
        answers = generate_answers(model, self.tokenizer, batch, self.max_new_tokens)
        prompts = texts_of(self.tokenizer, *prompts_of(model, batch))
        return [[rate(score, *row) for score in self.scores.values()] for row in zip(prompts, answers, references)]

    def _of_classes(self, rows: Sequence[Mapping], predictions: Sequence[int]) -> dict[str, float]:
        import torch

        from adazeta.metrics import macro_f1

        found, names = {}, self.task.labels
        if "f1" in self.names:
            labels = [row["labels"] for row in rows]
            found["f1"] = float(macro_f1(torch.tensor([list(predictions)]), torch.tensor([labels]), len(names)))
        if self.function:
            prompts = [self.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
            answers = zip(prompts, predictions, rows)
            values = [self.function(prompt, names[c], names[row["labels"]]) for prompt, c, row in answers]
            found["score"] = sum(values) / len(values)
        return found


@dataclass(frozen=True)
class Aim:
    """What training makes better.

    Args:
        name: ``"loss"``, ``"accuracy"``, ``"f1"``, ``"exact-match"``, or that of a function.
        function: a function of one's own.
        max_new_tokens: most tokens of an answer.
    """

    name: str
    function: OwnFunction | None = None
    max_new_tokens: int = 32

    @property
    def is_metric(self) -> bool:
        """Whether it is one that has to be named to be measured."""
        return self.name in ("f1", "exact-match")

    def generates(self, task: Task) -> bool:
        """Whether a step generates answers."""
        return task.kind == CompletionTask.kind and (self.function is not None or self.is_metric)

    def identity(self, task: Task) -> dict[str, Any]:
        """Return what the journal of a run keeps of it; nothing for the loss."""
        if self.name == "loss":
            return {}
        kept = {"name": self.name}
        if self.function:
            kept["sha256"] = self.function.sha256
        if self.generates(task):
            kept["max_new_tokens"] = self.max_new_tokens
        return {"objective": kept}

    def loss(self, task: Task, loss, tokenizer):
        """Return the loss per row that stands for it, from the task's own ``loss``."""
        from adazeta.objectives import ClassObjective, CompletionAccuracy, GenerationObjective

        if self.name == "loss":
            return loss
        if self.generates(task):
            return GenerationObjective(tokenizer, self.function or self.name, self.max_new_tokens, stands_for=loss)
        if task.kind == CompletionTask.kind:
            return CompletionAccuracy(loss)
        return ClassObjective(loss, self.function or self.name, task.labels, tokenizer)


def aim_of(settings: Mapping[str, Any]) -> Aim:
    """Return what the settings of a run aim at; a file that they name is run.

    Args:
        settings: ``objective``, ``task``, ``directions``, ``eps``, ``lr`` and ``max_new_tokens``.

    Raises:
        UserError: an objective that the other settings cannot have, or a function that cannot be loaded.
    """
    name, kind = settings["objective"], settings["task"]
    if name != "loss" and "auto" in (settings["eps"], settings["lr"]):
        raise UserError(f"auto measures the task's loss, and {name} is another one: give --eps and --lr as numbers")
    if is_function(name):
        if kind == ChoiceTask.kind:
            raise UserError(f"a function compares names of classes, which task {kind} has none of: use accuracy")
        function = load_function(name)
        return Aim(function.name, function, settings["max_new_tokens"])
    if name in ("f1", "exact-match"):
        check_metric(kind, name)
    if name == "f1" and kind != CompletionTask.kind and settings["directions"] == "example":
        raise UserError(
            "the F1 of classes is that of all examples that share a direction, and with --directions example none do: "
            "use --directions batch (or a number of groups), with a smaller --lr"
        )
    return Aim(name, None, settings["max_new_tokens"])


def measures_of(settings: Mapping[str, Any], task: Task, tokenizer, function: OwnFunction | None = None) -> Measures:
    """Return what ``metric`` and ``max_new_tokens`` of some settings say, with a function of one's own."""
    return Measures(task, tokenizer, tuple(settings["metric"]), function, settings["max_new_tokens"])


def check_metric(kind: str, name: str) -> None:
    """Raise UserError where a kind of task has no such metric."""
    if kind == ChoiceTask.kind:
        raise UserError(f"task {kind} is measured by its accuracy, got {name}: an example's candidates are its own")
    if kind != CompletionTask.kind and name == "exact-match":
        raise UserError(f"{name} compares answers, and task {kind} has classes: use accuracy")
