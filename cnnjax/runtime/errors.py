"""The common form of messages: errors of libraries in one line."""

# Libraries may print whole files in a message.
_MOST_CHARACTERS = 300


def one_line(error: BaseException) -> str:
    """Returns an error's message in one line, cut off after 300 characters."""
    return " ".join(str(error).split())[:_MOST_CHARACTERS]
