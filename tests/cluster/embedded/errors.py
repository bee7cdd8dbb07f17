"""The one exception that the command line turns into a message instead of a traceback."""


class ClusterError(Exception):
    """Something the user can act on: says what failed, where, and what to do."""
