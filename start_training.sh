#!/bin/sh
# Installs trainerd on the first start, then shows its menu; with words behind it, runs that command and asks nothing:
#   ./start_training.sh | quick | standard | extended | status | monitor | stop | reinstall | any command of trainerd
# TRAINERD_PYTHON=/path/to/python uses that complete environment and installs nothing.
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
here=$(CDPATH='' cd -- "$here" && pwd) || exit 4

# The first Python that can carry trainerd; the ones that cannot are told about.
find_python() {
    refused=
    for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        command -v "$name" >/dev/null 2>&1 || continue
        verdict=$("$name" "$here/launcher/probe.py" 2>/dev/null)
        case $? in
            0) base=$name; return 0 ;;
            10 | 11) refused="$refused    $verdict
" ;;
        esac
    done
    echo "Not installed: no Python from 3.10 to 3.14 with venv was found." >&2
    [ -z "$refused" ] || printf 'Looked at:\n%s' "$refused" >&2
    echo "What to do: install one (Debian, Ubuntu: sudo apt install python3 python3-venv; Fedora: sudo dnf install python3.12;" >&2
    echo "any system: https://www.python.org/downloads/), then start again." >&2
    return 4
}

python=${TRAINERD_PYTHON:-$here/.venv/bin/python}
fresh=
[ "$1" != reinstall ] || fresh=--fresh
if [ -n "$TRAINERD_PYTHON" ]; then
    if [ -n "$fresh" ] || ! command -v "$python" >/dev/null; then
        echo "TRAINERD_PYTHON is set ($python): nothing is installed then, and it must be a Python with trainerd's requirements." >&2
        echo "What to do: correct it, or unset it to let start_training install by itself." >&2
        exit 2
    fi
else
    if [ -n "$fresh" ] || ! "$python" -I -S "$here/launcher/stamp.py" 2>/dev/null; then
        [ -z "$_TRAINERD_COMPLETE" ] || exit 0  # a shell asks how the line may go on: nothing is installed for that
        find_python || exit
        "$base" "$here/launcher/install.py" $fresh || exit
    fi
fi
[ -z "$fresh" ] || exit 0
exec "$python" "$here/launcher/start.py" "$@"
