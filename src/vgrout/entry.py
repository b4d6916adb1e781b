"""How every program of the project ends. Imports nothing heavy."""

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from vgrout.core import UserError

T = TypeVar("T")


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text} is no whole number from {least}")
        return int(text)

    return number


def run_main(main: Callable[..., T], *arguments: object) -> T:
    """main(*arguments); a UserError becomes its one line on stderr and exit status 2, an interrupt exit status 130."""
    try:
        return main(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
