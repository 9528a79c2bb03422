"""The two ways a command can end badly: the user's input was wrong, or the work failed."""


class InputError(Exception):
    """Wrong input or usage. The message is one line: what, where, both values, the way out. Exit code 2."""


class RunError(Exception):
    """The input was fine and the work still failed (a worker died, training diverged). Exit code 1."""


class Stopped(RunError):
    """The training ended early because it was asked to."""
