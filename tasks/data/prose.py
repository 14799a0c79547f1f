"""English prose that is always there: the reference of the Python language, as its help shows it.

About 465,000 characters in 79 topics; a little other in each version of Python.
"""

from tasks.data.symbols import TextSource


def read() -> list[str]:
    """The topics, in alphabetical order."""
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


TEXTS = {
    "prose": TextSource(
        read, "English prose, characters", "Python's language reference (pydoc_data.topics)", "PSF"
    )
}
