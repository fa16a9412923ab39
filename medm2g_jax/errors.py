"""The one error a user can cause: printed as a single line by `main` and `cli`, never as a traceback."""


class UserError(Exception):
    """Something in the user's hands is wrong. The message names the file, key or field, what was expected, what was
    found, and what to type to mend it. Every other exception is a bug and keeps its traceback."""
