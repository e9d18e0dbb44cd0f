"""The one exception that is the user's to mend, and how it is shown."""


class UserError(Exception):
    """A mistake the user can mend: one line, what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def require(condition: object, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
