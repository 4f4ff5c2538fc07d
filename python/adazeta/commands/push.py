"""Put a run on the Hugging Face hub: ``adazeta push``."""

from __future__ import annotations

from ..errors import UserError
from . import command, say


def add(commands) -> None:
    """Add the command."""
    push = command(commands, "push", _push, "upload a run folder to the Hugging Face hub")
    push.add_argument("name", metavar="RUN", help="run folder")
    push.add_argument("repository", metavar="REPOSITORY", help="name on the hub, as user/name; made if it is not there")
    push.add_argument("--private", action="store_true", help="make it for you alone, if it is new (default: off)")
    push.set_defaults(may_go_online=True)


def _push(arguments) -> int:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from ..model_card import push_run

    try:
        done = push_run(arguments.name, arguments.repository, private=arguments.private or None, say=say)
    except (HFValidationError, *HfHubHTTPError.__bases__) as error:  # OSError, and that of the client it is built on
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{arguments.name} is not on the hub (log in with `hf auth login`): {reason}") from error
    print(done)
    return 0
