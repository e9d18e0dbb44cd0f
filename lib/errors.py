"""The one exception that is the user's to mend, and how it is shown."""


class UserError(Exception):
    """A mistake the user can mend: one line, what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # What is quoted in it, a name or another's message, may have several.
        super().__init__(" ".join(message.splitlines()))


def require(condition: object, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
