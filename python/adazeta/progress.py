"""Trainer callbacks of the command line: a progress bar, ``metrics.jsonl``, limits in rows and minutes, Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from adazeta.distributed import INTERRUPTED, LATE
from adazeta.errors import UserError
from adazeta.files import disk_errors, write_text
from adazeta.runs import read_metrics

SMOOTHING = 20  # train losses averaged in the bar


class _Lines:
    """A stream that is a file or a pipe, on which what a bar draws over its last state becomes a line of its own."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        if line := text.strip():  # a bar that leaves draws blanks over itself
            self._stream.write(f"{line}\n")


def progress_bar(total: int, label: str, unit: str, *, leave: bool = True) -> tqdm:
    """Return a tqdm bar on stderr; where that is not a terminal, a line each ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.1 if terminal else 10.0,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {unit} "
        "[{elapsed}, {remaining} left{postfix}]",
        file=sys.stderr if terminal else _Lines(sys.stderr),
        position=None if terminal else 0,  # no moving between the lines of two bars
        delay=0 if terminal or leave else 10,
    )


class Bar(TrainerCallback):
    """Show steps, smoothed loss, queries, rows/s and time left; a second bar during evaluation."""

    def __init__(self):
        self._train = self._eval = None
        self._losses: deque[float] = deque(maxlen=SMOOTHING)

    def on_train_begin(self, args, state, control, **kwargs):
        self._train = progress_bar(state.max_steps, "train", "steps")
        self._train.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._train.update(state.global_step - self._train.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._train is None or "loss" not in (logs or {}):
            return
        self._losses.append(logs["loss"])
        parts = [f"loss {sum(self._losses) / len(self._losses):.3f}"]
        if "zo/queries" in logs:
            parts.append(f"queries {int(logs['zo/queries'])}")
        if "rows_per_second" in logs:
            parts.append(f"{logs['rows_per_second']:.1f} rows/s")
        if logs.get("zo/dropped"):
            parts.append(f"dropped {int(logs['zo/dropped'])}")
        self._train.set_postfix_str(", ".join(parts), refresh=False)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._eval is None:
            self._eval = progress_bar(len(eval_dataloader), "dev", "batches", leave=False)
        self._eval.update(1)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self._eval is not None:
            self._eval.close()
            self._eval = None
        if self._train is not None and metrics and "eval_loss" in metrics:
            values = ", ".join(f"{name} {value:.3f}" for name, value in measured(metrics).items())
            self._train.write(f"step {state.global_step}: dev {values}", file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        self._train.close()
        self._train = None


class MetricsFile(TrainerCallback):
    """Append one JSON line per log and per evaluation to ``metrics.jsonl``; flushed, cut back on resume.

    Train lines: ``{"kind": "train", "step", "rows", "seconds", "loss", "zo/queries", ...}``, all that ``ZOTrainer``
    logs; dev lines: ``{"kind": "dev", "step", "rows", "seconds", "loss", "accuracy", ...}``, all that is measured.
    ``rows`` counts forward rows of training so far, ``seconds`` the time since training began, evaluations left out (a
    resumed run goes on counting).
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = 0
        self.seconds = 0.0
        self._since = 0.0
        self._stream = None

    def on_train_begin(self, args, state, control, **kwargs):
        step = state.global_step
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        if kept:
            self.rows, self.seconds = kept[-1]["rows"], kept[-1]["seconds"]
        self._since = time.monotonic()
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        with disk_errors(self.path):
            self._stream = self.path.open("a", encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._stream is None or "loss" not in (logs or {}):
            return
        self.rows = int(logs.get("rows", self.rows))
        values = {name: value for name, value in logs.items() if name not in ("rows", "epoch", "step")}
        self._write({**self._head("train", state), **values})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self._stream is None:
            return
        self._since += (metrics or {}).get("eval_runtime", 0.0)
        self._write({**self._head("dev", state), **measured(metrics or {})})

    def on_train_end(self, args, state, control, **kwargs):
        self._stream.close()
        self._stream = None

    def _head(self, kind: str, state) -> dict:
        now = time.monotonic()
        self.seconds += max(0.0, now - self._since)
        self._since = max(now, self._since)
        return {"kind": kind, "step": state.global_step, "rows": self.rows, "seconds": round(self.seconds, 3)}

    def _write(self, line: dict) -> None:
        with disk_errors(self.path):
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """Return what an evaluation of the Trainer measured, without what it cost: loss, accuracy, f1, ..."""
    names = (name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
    return {n: metrics[f"eval_{n}"] for n in names if n != "runtime" and not n.endswith("_per_second")}


class Wandb(WandbCallback):
    """The Trainer's callback for W&B; the run there knows the ``settings`` of this one, as ``adazeta``.

    Raises:
        UserError: when training begins, if W&B does not: nobody is logged in, or it cannot be reached.
    """

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = settings

    def setup(self, *args, **kwargs):
        from wandb.errors import Error

        try:
            super().setup(*args, **kwargs)
        except (Error, ValueError, OSError) as error:  # ValueError: a WANDB_... variable that it cannot read
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--report-to wandb: {reason} (WANDB_MODE=offline needs neither login nor net)") from error
        self._wandb.config.update({"adazeta": self.settings})


class Limits(TrainerCallback):
    """End training after ``rows`` forward rows or ``minutes``; on the first Ctrl-C save a checkpoint and stop.

    A limit ends the run as if its steps were done; after Ctrl-C ``interrupted`` is True and the run can be resumed.
    The last step is evaluated whatever the interval, if ``evaluate``. Of many ``ranks`` all stop after the same step:
    the one after that in which the clock or a Ctrl-C stopped the first.
    """

    def __init__(self, rows: int | None = None, minutes: float | None = None, *, evaluate: bool = True, ranks=None):
        self.rows, self.minutes, self.evaluate, self.ranks = rows, minutes, evaluate, ranks
        self.interrupted = self._asked = False
        self._start = 0.0
        self._previous = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self._start = time.monotonic()
        done = getattr(getattr(optimizer, "optimizer", optimizer), "rows", 0)
        control.should_training_stop = self.rows is not None and done >= self.rows  # a run resumed at its limit
        if threading.current_thread() is threading.main_thread():
            self.release()  # the Trainer begins again with a smaller batch where it looks for the largest
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number, frame):
        self._asked, self.interrupted = True, self.ranks is None
        signal.signal(signal.SIGINT, self._previous)  # a second Ctrl-C stops at once
        if self.ranks is None or self.ranks.rank == 0:
            print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        late = self.minutes is not None and time.monotonic() - self._start >= 60 * self.minutes
        if self.ranks is not None:
            self.ranks.stop = INTERRUPTED if self._asked else LATE if late else 0
            self.interrupted, late = self.ranks.stopping == INTERRUPTED, self.ranks.stopping == LATE
        if self.interrupted:
            control.should_save = control.should_training_stop = True
            return
        if late or state.global_step >= state.max_steps:
            self._end(control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.rows is not None and (logs or {}).get("rows", 0) >= self.rows:
            self._end(control)

    def _end(self, control) -> None:
        control.should_training_stop = True
        control.should_evaluate = control.should_evaluate or self.evaluate

    def on_train_end(self, args, state, control, **kwargs):
        self.release()

    def release(self) -> None:
        """Give Ctrl-C back, also where training ended in an error."""
        # Asked of the process, not of ``_asked``: what held Ctrl-C back meanwhile may have put this handler in again.
        if self._previous is not None and signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, self._previous)
