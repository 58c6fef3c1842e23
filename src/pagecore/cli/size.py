"""Sizes on the command line."""

from __future__ import annotations

from typing import Any

import click

from pagecore.migrate import parse_size


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs of some versions only
    """A size as 4K, 2M or 1G; ``none`` where that is a choice."""

    name = "size"

    def __init__(self, none: str | None = None) -> None:
        self._none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Bytes; None for the word that stands for no size."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if self._none is not None and value.lower() == self._none:
            return None
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
