"""Data files as bytes and as text: compression and encoding."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from petals_lightning.errors import ConfigurationError

_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}
_LFS_POINTER = b"version https://git-lfs.github.com"


class Malformed(ValueError):
    """A file breaks the rules of its format; the message names the line or the row."""


UNREADABLE = (Malformed, pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""Errors of reading a broken file, except `UnicodeError`."""


@dataclass(frozen=True)
class TextFormat:
    """The format of text files, as far as it is not detected.

    Args:
        encoding: of files that are not detected as UTF-16 or UTF-32; None is UTF-8.
        delimiter: between the cells of csv and tsv files, or its name in `_DELIMITERS`; None detects it.

    Raises:
        ConfigurationError: there is no such encoding, or the delimiter is not one character.
    """

    encoding: str | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError:
            raise ConfigurationError(
                f"encoding={self.encoding}: no such encoding; there are utf-8, latin-1, cp1252, utf-16-le, …"
            ) from None
        delimiter = _DELIMITERS.get(self.delimiter or "", self.delimiter)
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise ConfigurationError(
                f"delimiter={delimiter}: must be one character, or one of {', '.join(_DELIMITERS)}"
            )
        object.__setattr__(self, "delimiter", delimiter)


def suffixes(path: Path) -> tuple[str, str]:
    """The suffixes of a file's format and of its compression, in lower case; the second is empty if there is none."""
    name = path.name.lower()
    compression = next(suffix for suffix in _OPENERS if name.endswith(suffix))
    return Path(name.removesuffix(compression)).suffix, compression


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed.

    Raises:
        Malformed: git-lfs has not fetched the file, or an archive contains several files.
        OSError, …: see `UNREADABLE`.
    """
    opener = _OPENERS[suffixes(path)[1]]
    with opener(path) as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise Malformed("only git-lfs's pointer to the data is here; fetch the data with `git lfs pull`")
    return opener(path)


def open_text(path: Path, form: TextFormat, newline: str | None = None) -> IO[str]:
    """A file's text, without a byte order mark; `newline` as for Python's `open`."""
    return io.TextIOWrapper(open_bytes(path), encoding=_encoding(path, form), newline=newline)


def why_undecodable(path: Path, form: TextFormat) -> str:
    """The first byte of a file that its encoding does not allow, and what to do about it."""
    encoding = _encoding(path, form)
    with open_bytes(path) as file:
        data = file.read()
    if encoding == "utf-8" and b"\0" in data:
        return "it contains zero bytes, which no text does: it is not in the format of its name"
    place = "it"
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, errors="replace")
        line = 1 + before.replace("\r\n", "\n").replace("\r", "\n").count("\n")
        place = f"byte 0x{data[error.start]:02x} in line {line}"
    except UnicodeError:  # UTF-16 without a byte order mark
        pass
    name = encoding.removesuffix("-sig").upper()
    return f"{place} is not {name}; set encoding=… to the file's encoding (latin-1, cp1252, utf-16-le, …)"


def _encoding(path: Path, form: TextFormat) -> str:
    """The encoding by the byte order mark or by the zero bytes of UTF-16 and UTF-32; else the given one; else UTF-8."""
    with open_bytes(path) as file:
        found = json.detect_encoding(file.read(4))
    return found if found != "utf-8" else form.encoding or found


def _open_archive(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise Malformed(f"the archive contains {len(names)} files, not one: unpack it")
    return archive.open(names[0])


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(path, compression="zstd"),
    ".zip": _open_archive,
    "": lambda path: path.open("rb"),
}
COMPRESSIONS = tuple(filter(None, _OPENERS))
