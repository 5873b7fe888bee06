"""The one exception for a user's mistake."""


class InputError(ValueError):
    """A mistake in what the user gave: an option, a file or a folder.

    The message is one line that names the option or file, what was expected and what was found.
    The command line turns this exception, and no other, into exit code 2.
    """
