"""The exception for mistakes that the user can correct."""


class UserError(Exception):
    """One line on what is wrong and what to do; the command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a quoted text may have several lines


def require(condition: object, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
