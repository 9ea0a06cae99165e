"""Tells whether the Python that runs it can carry trainerd: 0 yes, 10 wrong version, 11 no venv.

Must run on any Python, also 2.7, and must not import anything of ours.
"""

import struct
import sys

OLDEST, NEWEST = (3, 10), (3, 14)


def verdict():  # type: ignore[no-untyped-def]  # annotations are a syntax error for Python 2
    """The exit code, and a line for a person that names this Python and what is wrong with it."""
    name = "Python {}.{}.{} at {}".format(*(list(sys.version_info[:3]) + [sys.executable]))  # noqa: RUF005  # Python 2 again
    if sys.version_info[:2] < OLDEST:
        return 10, name + ": too old (3.10 to 3.14 is needed)"
    if sys.version_info[:2] > NEWEST:
        return 10, name + ": too new (3.10 to 3.14 is needed)"
    if struct.calcsize("P") != 8:
        return 10, name + ": a 32-bit build (PyTorch needs a 64-bit one)"
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        remedy = "on Debian and Ubuntu: sudo apt install python{}.{}-venv".format(*sys.version_info[:2])
        return 11, name + ": it cannot make environments, its venv part is missing (" + remedy + ")"
    return 0, name


if __name__ == "__main__":
    code, line = verdict()  # type: ignore[no-untyped-call]
    sys.stdout.write(line + "\n")
    sys.exit(code)
