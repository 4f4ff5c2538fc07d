"""The error a person can act on: one line, without a traceback on the command line."""


class UserError(RuntimeError):
    """Something outside the program is wrong (a path, a file, a label, a full disk); the message says what to do.

    The command line prints the message on one line and exits with status 2. Wrong *arguments* of Python functions
    raise ``ValueError`` or ``TypeError`` instead.
    """
