"""Folders, zips and names for the tests of storage.py and of what lies beside it in files/."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import storage

HERE = Path(storage.__file__).parent  # where a new process finds the modules
EVIL = "mus-evil.png"  # must appear nowhere outside
JOB = "0b5a1a5e-5f8e-4a55-9a0c-3b8f0f4a8a10"
ESCAPES = [  # as names in an archive, and as paths of clients
    f"../{EVIL}",
    f"ok/../../../tmp/{EVIL}",
    f"ok/../{EVIL}",
    f"/tmp/{EVIL}",
    f"//tmp/{EVIL}",
    f"C:\\Windows\\{EVIL}",
    f"C:/Windows/{EVIL}",
    f"C:{EVIL}",
    f"z:{EVIL}",
    f"..\\..\\{EVIL}",
    f"a\\..\\../..\\{EVIL}",
    f"\\\\server\\share\\{EVIL}",
    f"\\\\?\\C:\\{EVIL}",
    f"\\{EVIL}",
    f"001.png\0{EVIL}",
    f"../{EVIL}\0.png",
    "a/..",
    "..",
    ".",
    "/",
    "",
]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
