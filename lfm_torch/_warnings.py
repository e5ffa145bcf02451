"""The one warning category of the library, so that users can filter or escalate it by name."""


class LFMWarning(UserWarning):
    """A result that is usable but not what was asked for: a solver that did not converge, a slow path taken."""
