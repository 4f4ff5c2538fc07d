"""What a model is fine-tuned to do. One file per kind of task."""

from adazeta.tasks.classification import LabelWordTask

__all__ = ["LabelWordTask"]
