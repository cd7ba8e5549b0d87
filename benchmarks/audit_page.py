"""The page."""


def write(found):
    pass
