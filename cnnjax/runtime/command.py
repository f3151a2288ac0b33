"""The common part of all commands: one-line errors, exit codes, shared options."""

import argparse
import codecs
import io
import logging
import os
import pathlib
import select
import sys
import warnings
from collections.abc import Callable, Collection, Sequence

from cnnjax.runtime import signals, workdir
from cnnjax.runtime.paths import expand_user

# EX_TEMPFAIL of sysexits.h: the same command continues from where this one stopped.
RESUMABLE = 75
# A shell's exit code for a command that SIGPIPE ended.
UNREAD = 141

_STANDARD_OUTPUT = 1
_STANDARD_ERROR = 2
# Python's default error handlers of standard output; the second is that of the C locale.
_DEFAULT_HANDLERS = ("strict", "surrogateescape")


def path(text: str) -> pathlib.Path:
    """Parses an argument that is a path; "~" is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path")
    return expand_user(text)


def policies(options: argparse.Namespace) -> dict[str, str]:
    """Collects --padding and --sampling if given: a user's network may have neither."""
    values = {"padding": options.padding, "sampling": options.sampling}
    return {name: value for name, value in values.items() if value is not None}


def whole_number(least: int) -> Callable[[str], int]:
    """Returns the parser of an argument that is a whole number of at least `least`."""

    def parse(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


class _Trained(argparse.Action):
    """Collects --trained NAME FILE [MODULE ...] in a dictionary of (file, modules) by name."""

    def __call__(self, parser, options, values, flag=None):
        if len(values) < 2:
            parser.error(f"trained={values[0]} names no file")
        name, file, *modules = values
        trained = getattr(options, self.dest)
        if name in trained:
            parser.error(f"trained={name} is given twice")
        setattr(options, self.dest, trained | {name: (os.path.expanduser(file), tuple(modules))})


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps its description's lines and has one-line errors."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str):
        """Prints a one-line error and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_workdir(self, default: str) -> None:
        """Adds --workdir, the folder to write to, as a path."""
        self.add_argument(
            "--workdir",
            type=path,
            default=pathlib.Path(default),
            help="where to write (default: %(default)s)",
        )

    def add_data_dir(self, files: str = "CIFAR-10's files") -> None:
        """Adds --data_dir, the folder of `files`, as a string; the default is "data"."""
        self.add_argument(
            "--data_dir",
            type=os.path.expanduser,
            default="data",
            help=f"the folder of {files} (default: %(default)s)",
        )

    def add_photographs(self) -> None:
        """Adds --photographs, a folder as a string; empty for those that are included."""
        self.add_argument(
            "--photographs",
            type=os.path.expanduser,
            default="",
            help="a folder of photographs (default: those included in scikit-image and "
            "scikit-learn)",
        )

    def add_trained(self) -> None:
        """Adds --trained, a dictionary of (file, modules that it lacks) by encoder."""
        self.add_argument(
            "--trained",
            nargs="+",
            action=_Trained,
            default={},
            metavar=("NAME", "FILE_OR_MODULE"),
            help="an encoder, one file of its ImageNet weights, then any top-level modules that "
            "the file lacks; may be repeated",
        )

    def add_count(self, name: str, default: int, text: str, least: int = 1) -> None:
        """Adds an option that is a whole number of at least `least`."""
        self.add_argument(
            f"--{name}",
            type=whole_number(least),
            default=default,
            help=f"{text} (default: %(default)s)",
        )

    def add_names(
        self, name: str, choices: Collection[str], default: Sequence[str] | None = None
    ) -> None:
        """Adds an option that is one or more of `choices`; by default it is all of them."""
        self.add_argument(
            f"--{name}",
            nargs="+",
            choices=choices,
            default=list(choices if default is None else default),
            help="default: " + ("all" if default is None else " ".join(default)),
        )


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt


def _is_output_closed() -> bool:
    """Tells whether standard output is a pipe that nobody reads any more.

    A `BrokenPipeError` may also come from another pipe, such as one to a process that has died.
    """
    output = select.poll()
    output.register(_STANDARD_OUTPUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def _discard(stream: int) -> None:
    """Sends what is left of an output that cannot be written into the null device.

    Python flushes its buffers when it ends, which cannot fail there.
    """
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream)


def _is_output_lost() -> bool:
    """Tells whether what was printed last cannot be written to standard output."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        return True
    return False


def _flush_or_discard() -> None:
    """Flushes both outputs, and discards what cannot be written, as on a full disk.

    Python would try again when it ends, report the failure in lines of its own, and exit with 120.
    """
    for output, stream in ((sys.stdout, _STANDARD_OUTPUT), (sys.stderr, _STANDARD_ERROR)):
        # A closed output is None.
        if output is not None:
            try:
                output.flush()
            except OSError:
                _discard(stream)


def _print_error(message: object) -> None:
    """Prints to standard error, unless that is closed or nobody reads it."""
    if sys.stderr is None:
        return
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        _discard(_STANDARD_ERROR)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handles an encoding error: keeps raw bytes of file names, escapes other characters.

    They become \\x or \\u with their number.
    """
    # One character at a time: a byte of a name may follow a character that has no byte.
    if isinstance(error, UnicodeEncodeError):
        error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _escape_unencodable_output() -> None:
    """Lets standard output print names that its encoding lacks, such as those of files and classes.

    The bytes of a file name that is not UTF-8 are written as they are, so a program that reads the
    output from a pipe gets the true name. Standard error prints all such names with backslashes.
    """
    # Notebooks and tests replace standard output by other objects.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _DEFAULT_HANDLERS:
        codecs.register_error("cnnjax", _escape)
        sys.stdout.reconfigure(errors="cnnjax")


def run(work: Callable[[], None]) -> int:
    """Does a command's work and returns its exit code.

    With --debug on the command line, errors come with their traceback.

    Returns:
        0 for success, 1 for a failure, 2 for bad input; 75 if the command was stopped and the same
        command continues, 130 if it was stopped and starts over; 141 if nobody reads what it prints
        any more, as after `| head`.
    """
    # Imported libraries may have set another format.
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("cnnjax").setLevel(logging.INFO)
    _escape_unencodable_output()
    # Pillow warns of large images, which `photographs` refuses with an error anyway. The filter is
    # set here, not where images are opened: filters apply to the whole process, and images are
    # opened in threads.
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")
    try:
        with signals.catch_stop_signals(_interrupt):
            work()
        if sys.stdout is not None:
            sys.stdout.flush()
    except workdir.Interrupted as stop:
        _print_error(stop)
        return RESUMABLE
    except KeyboardInterrupt:
        _print_error("interrupted: what was finished is whole, nothing else was written")
        return 130
    except ModuleNotFoundError as error:
        # An installation without extras lacks packages that some commands import.
        if "--debug" in sys.argv or (error.name or "").startswith("cnnjax"):
            raise
        _print_error(
            f"error: {error.name} is not installed; in a checkout of cnnjax, pip install '.[all]' "
            "installs what all commands import"
        )
        return 1
    except (ValueError, RuntimeError, OSError, ArithmeticError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return UNREAD
        if "--debug" in sys.argv:
            raise
        # XLA's messages have many lines; some errors have no message.
        lines = str(error).strip().splitlines()
        first = lines[0] if lines else type(error).__name__
        # An `OSError` about a file names it; one about standard output names nothing.
        if isinstance(error, OSError) and error.filename is None and _is_output_lost():
            first = f"standard output: {first}"
        _print_error(f"error: {first}")
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
    finally:
        _flush_or_discard()
    return 0
