"""The one exception for a user's mistake, and what others raise in one sentence."""

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A mistake in what the user gave: an option, a file or a folder.

    The message is one line that names the option or file, what was expected and what was found.
    The command line turns this exception into exit code 2, and jsonargparse's own, and no other.
    """


def argument_sentence(error: Exception) -> str:
    """What jsonargparse found wrong, without its account of every type that it tried.

    Args:
        error: Its error about a command line or a yaml.

    Returns:
        One sentence; jsonargparse's own where it is short already.
    """
    text = " ".join(str(error).split())
    named = re.findall(r'Parser key "([^"]+)"', text)
    keys = ".".join(named) or "the command line"
    if found := re.search(r"arguments are required: (.+)", text):
        if found[1].endswith(".model"):
            return "Expected a model in --config FILE, or in the config.yaml of --run FOLDER, got none"
        return f"Expected {found[1]} to be given, got none"
    if named and "unrecognized arguments" in text and (nested := re.findall(r"NestedArg\(key='(.+?)'", text)):
        return f"Expected options of {named[0]}, got {named[0]}.{max(nested, key=len)}"
    unknown = r"(?:unrecognized arguments: (.+)|Subcommand '.+?' does not accept option '(.+?)')"
    if found := re.search(unknown, text):
        return f"Expected options that the command has (--help lists them), got {found[1] or found[2]}"
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        classes = re.findall(r"class_path[= ]'([\w.]+)'", text[: found.start()])
        owner = classes[-1].rpartition(".")[2] if classes else "it"  # the innermost
        return f"Expected an option that {owner} has for {keys}, got {found[1]}"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"Expected the name of a class for {keys}, got {found[1]}"
    reasons = r"No module named .+?|module '.+?' has no attribute .+?|cannot import name .+?"
    if found := re.search(rf"class_path '([\w.]+)': ({reasons})(?= - Expected| Given value|$)", text):
        return f"Expected a class that can be imported for {keys}, got {found[1]}: {found[2]}"
    if found := re.search(r"correspond to a subclass of (\w+)(?=.* Given value: (.+?)(?: - Expected|$))", text):
        value = re.search(r"'class_path': '([\w.]+)'", found[2])
        return f"Expected a {found[1]} for {keys}, got {value[1] if value else found[2]}"
    kind = r"(?:<class '([^']+)'>|typing\.Literal\[(.+?)\])"
    if found := re.search(rf"Expected an? {kind}\. Got value: (.+?)(?: - Expected| Given value|$)", text):
        expected = f"of type {found[1]}" if found[1] else f"one of {found[2]}"
        return f"Expected {keys} to be {expected}, got {found[3]}"
    if found := re.search(r"(?:File does not exist|Path is not a file): '(.+?)'", text):
        return f"Expected a file for {keys}, got none at {found[1]}"
    if found := re.search(r"Unable to load config ['\"](.+?)['\"]", text):
        return f"Expected a configuration for {named[0] if named else 'the command line'}, got {found[1]}"
    if found := re.search(r"(?:Problems parsing|Unexpected) config: (.+)", text):
        return f"Expected configurations in YAML, names with values, got: {found[1]}"
    if found := re.search(r".*Subtypes: \[(.+?)\] Errors: .*?Given value: (.+?)(?: - Expected|$)", text):  # innermost
        kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+?)\]", r"\1\2", found[1])
        return f"Expected {keys} to be one of {kinds.replace('NoneType', 'null')}, got {found[2]}"
    return text


def fault_in_code(error: BaseException) -> BaseException | None:
    """Of an exception and those that led to it, one whose traceback is worth reading, or None.

    Such a one comes from a line of this package, or from a user's own class: what it raises itself, or what a library
    raises that it calls. What a library raises for us while a run is set up is about the options.
    """
    ours, standard = Path(__file__).parent, sysconfig.get_path("stdlib")
    while True:
        frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        if frames and frames[-1].is_relative_to(ours):
            return error
        for path in reversed(frames):
            if path.is_relative_to(ours):
                break
            is_library = not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or path.is_relative_to(standard)
            if path.is_file() and not is_library:
                return error
        if (before := error.__cause__ or error.__context__) is None:
            return None
        error = before


@contextmanager
def in_own_words() -> Iterator[None]:
    """Inside, what the constructor of a nested option refuses is told in its own sentence, not in jsonargparse's.

    Raises:
        InputError: With that sentence.
    """
    try:
        yield
    except InputError:
        raise
    except ValueError as error:  # jsonargparse's, which names all types that it tried
        if (sentence := constructor_sentence(error)) is None:
            raise
        raise InputError(sentence) from error


def constructor_sentence(error: ValueError) -> str | None:
    """What an `InputError` said that jsonargparse caught and reports among the errors of all types that it tried.

    Args:
        error: Of a constructor that is called for a nested option.

    Returns:
        Its sentence, by its words `Expected …, got …`; None if it has none.
    """
    text = " ".join(str(error).split())
    found = re.search(r"- (Expected (?:(?! - |<class).)+?, got (?:(?! - ).)+?)(?= - | Given value|$)", text)
    return found[1] if found else None
