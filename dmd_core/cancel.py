"""Work without a network that can take seconds asks here whether the user has cancelled."""


def ask() -> object:
    """The host puts its own question here (nodes/__init__.py), which raises where the answer is yes."""
    return None
