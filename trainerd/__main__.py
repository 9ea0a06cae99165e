"""The installed command `trainerd`, and `python -m trainerd`: opens the client, wherever it lies. Must not do anything else.

The wheel carries the client as `trainerd.client`; a checkout, and so an editable installation, has it as `client` beside
this package. It is found there by its place, never by the name `client` alone: somebody else's package may have it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


def main() -> int:
    sys.excepthook = _show
    return _client_main()()


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A Ctrl-C while everything is still being imported is no error to print."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _client_main() -> Callable[[], int]:
    import importlib
    from pathlib import Path

    try:
        module = importlib.import_module("trainerd.client.main")
    except ModuleNotFoundError as error:
        checkout = Path(__file__).resolve().parent.parent
        if error.name != "trainerd.client" or not (checkout / "client" / "main.py").is_file():
            raise
        sys.path.insert(0, str(checkout))
        module = importlib.import_module("client.main")
    opened: Callable[[], int] = module.main
    return opened


if __name__ == "__main__":
    sys.exit(main())
