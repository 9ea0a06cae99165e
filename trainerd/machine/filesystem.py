"""What kind of place a folder is: free space, on the network, kept in step with a cloud. Must not write there."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

# Locks and renames are not what they are on a local disk; 9p is how WSL shows the Windows drives.
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "beegfs", "davfs", "ncpfs", "coda"}
)
_NETWORK_FUSE = ("fuse.sshfs", "fuse.rclone", "fuse.glusterfs", "fuse.davfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.ceph", "fuse.vmhgfs-fuse")
_SYNCED = {"onedrive": "OneDrive", "dropbox": "Dropbox", "google drive": "Google Drive", "icloud": "iCloud", "nextcloud": "Nextcloud"}
_SYNC_VARIABLES = {"OneDrive": "OneDrive", "OneDriveConsumer": "OneDrive", "OneDriveCommercial": "OneDrive"}
_MOUNTS = Path("/proc/self/mountinfo")
_DRIVE_REMOTE = 4


def free_bytes(path: Path) -> int | None:
    """Bytes free for this user where `path` is, or where it will be once its parents exist. None: unknown."""
    found = _usage(path)
    return found[1] if found else None


def total_bytes(path: Path) -> int | None:
    """How large the file system there is. None: unknown."""
    found = _usage(path)
    return found[0] if found else None


def _usage(path: Path) -> tuple[int, int] | None:
    for place in (path, *path.absolute().parents):
        if place.exists():
            try:
                usage = shutil.disk_usage(place)
            except OSError:
                return None
            return usage.total, usage.free
    return None


def network_filesystem(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """The kind of network file system `path` lies on ("nfs4"), or None when it is local or unknown."""
    if sys.platform == "win32":
        return _network_drive(path)
    found = mount(path, mounts)
    return found[0] if found is not None and (found[0] in _NETWORK or found[0].startswith(_NETWORK_FUSE)) else None


def synced_folder(path: Path) -> str | None:
    """The service that keeps the folder of `path` in step with a cloud ("OneDrive"), or None."""
    real = Path(os.path.realpath(path))
    for variable, service in _SYNC_VARIABLES.items():
        root = os.environ.get(variable)
        if root and real.is_relative_to(os.path.realpath(root)):
            return service
    for folder in (real, *real.parents):
        for start, service in _SYNCED.items():
            if re.match(rf"{start}(\b|$)", folder.name.lower()):
                return service
        if (folder / ".dropbox.cache").exists():
            return "Dropbox"
    return None


def mount(place: Path, mounts: Path = _MOUNTS) -> tuple[str, str] | None:
    """Kind and source ("ext4", "/dev/sda2") of what is mounted where `place` lies: the longest mount point that is a prefix, the
    last one when mounted over. None where the system does not tell."""
    path, best, found = os.path.realpath(place), -1, None
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        parts = left.split()
        if len(parts) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), parts[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, found = len(point), (right.split()[0], right.split()[1] if " " in right.strip() else "")
    return found


def _network_drive(path: Path) -> str | None:
    if sys.platform != "win32":
        return None
    import ctypes

    root = path.absolute().anchor
    remote = root.startswith("\\\\") or ctypes.windll.kernel32.GetDriveTypeW(root) == _DRIVE_REMOTE
    return "a network drive" if remote else None
