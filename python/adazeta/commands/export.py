"""Write a run's adapter for other tools: ``adazeta export``."""

from __future__ import annotations

from . import command, quiet, say

HINTS = {
    "low-rank": "factors and shapes; adazeta.export.read_low_rank({folder!r}) reads them",
    "lora": "a LoRA adapter; peft.PeftModel.from_pretrained(base, {folder!r}) loads it",
    "merged": "a model without adapters; transformers loads it from {folder!r}",
}


def add(commands) -> None:
    """Add the command."""
    export = command(
        commands, "export", _export, "write a run's adapter as factors, as a LoRA, or merged into the model"
    )
    export.add_argument("name", metavar="RUN", help="run folder")
    export.add_argument("--to", required=True, choices=list(HINTS), help="what to write")
    export.add_argument("--output", metavar="DIR", help="folder to write (default: RUN-FORM)")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export (default: off)")
    export.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of a merged model's numbers; float32 alone holds the sum exactly (default: float32)",
    )


def _export(arguments) -> int:
    from ..export import export

    quiet()
    output = arguments.output or f"{arguments.name.rstrip('/')}-{arguments.to}"
    settings = {"dtype": arguments.dtype, "overwrite": arguments.overwrite, "say": say}
    folder = export(arguments.name, output, arguments.to, **settings)
    print(f"written to {folder}: {HINTS[arguments.to].format(folder=str(folder))}")
    return 0
