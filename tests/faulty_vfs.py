"""
A disk that fails, fills up and loses its power, for SQLite below chosen directories of this process.

Theory of operation
===================

SQLite reaches files through a table of C functions, its VFS. Here a copy of the default one is made the default, with
four functions of our own: opening, deleting and looking for a file, and randomness. So ``sqlite3.connect(path)`` in
production code comes here unchanged. A path below no :class:`Disk` is handed on to the original, which then serves the
open file itself.

A file below a disk is a real file, read and written by ``os.pread`` and ``os.pwrite``, so that plain code sees what a
running system would see. Beside it stands in memory what a power cut leaves for sure, the image as of the last sync,
and the list of what was written since. A power cut makes the file the image, plus a random prefix of that list, plus
perhaps a part of the next write. So it is with names: creations and deletions are kept in a list until the directory is
synced, and a power cut undoes a random tail of it. What plain code does to files (``os.rename``, ``os.unlink``) counts
as durable at once.

A sync that fails is as Linux has it: what was waiting for it may be on the disk or not, stays readable, and no later
sync will write it. For that there is :func:`commsmgr.spool.files.write_again`, which the disk is asked about as well.

Handles that a crash killed never come back to Python: their table of functions is replaced by one in which everything
fails, made of a C function of SQLite that takes nothing and returns 1, which is SQLITE_ERROR. So a connection that is
collected long afterwards, even while the interpreter ends, changes nothing.

There are no locks and no shared memory: one process, ``locking_mode = EXCLUSIVE``. One thread at a time: a crash must
not happen while another thread is in SQLite.
"""

from __future__ import annotations

import _sqlite3
import atexit
import ctypes
import errno
import os
import sqlite3
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int, c_int64, c_void_p
from itertools import count
from random import Random
from typing import Any, Final

from msgspec import Struct

from commsmgr.spool import files as spool_files

IOERR: Final = {
    "open": sqlite3.SQLITE_CANTOPEN,
    "read": sqlite3.SQLITE_IOERR_READ,
    "write": sqlite3.SQLITE_IOERR_WRITE,
    "truncate": sqlite3.SQLITE_IOERR_TRUNCATE,
    "sync": sqlite3.SQLITE_IOERR_FSYNC,
    "delete": sqlite3.SQLITE_IOERR_DELETE,
}
"""The error that fits each kind of operation."""

SECTOR: Final = 512

# From sqlite3.h; the sqlite3 module does not have them.
_OPEN_READONLY, _OPEN_READWRITE, _OPEN_CREATE, _OPEN_EXCLUSIVE, _OPEN_DELETEONCLOSE = 0x1, 0x2, 0x4, 0x10, 0x8
_OPEN_SYNCS_NAME = 0x00000800 | 0x00004000 | 0x00080000
"""A main journal, a super-journal or a log: at its first sync SQLite's own VFS syncs the directory as well."""
_POWERSAFE_OVERWRITE = 0x1000
_SECTOR_SIZE = 4096
_HAS_MOVED = 20
"""The question whether the file has another name now: SQLite does not fold its log into one that has."""


class Crashed(Exception):
    """Raised by a hook: the process or the power is gone before this operation."""


class Operation(Struct, frozen=True):
    """
    What SQLite is about to do.

    :ivar kind: open, read, write, truncate, sync or delete.
    :ivar offset: for a truncation the new size.
    """

    kind: str
    path: str
    offset: int
    size: int


class _VFS(Structure):
    _fields_ = (
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", c_void_p),
        ("xDelete", c_void_p),
        ("xAccess", c_void_p),
        ("xFullPathname", c_void_p),
        ("xDlOpen", c_void_p),
        ("xDlError", c_void_p),
        ("xDlSym", c_void_p),
        ("xDlClose", c_void_p),
        ("xRandomness", c_void_p),
        ("xSleep", c_void_p),
        ("xCurrentTime", c_void_p),
        ("xGetLastError", c_void_p),
        ("xCurrentTimeInt64", c_void_p),
        ("xSetSystemCall", c_void_p),
        ("xGetSystemCall", c_void_p),
        ("xNextSystemCall", c_void_p),
    )


# The name is a pointer, for the original keeps it, and there is more behind the name's end.
_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, POINTER(c_int))
_Delete = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_Access = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, POINTER(c_int))
_Randomness = CFUNCTYPE(c_int, c_void_p, c_int, c_void_p)

_METHODS: Final[dict[str, Any]] = {
    "xClose": CFUNCTYPE(c_int, c_void_p),
    "xRead": CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64),
    "xWrite": CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64),
    "xTruncate": CFUNCTYPE(c_int, c_void_p, c_int64),
    "xSync": CFUNCTYPE(c_int, c_void_p, c_int),
    "xFileSize": CFUNCTYPE(c_int, c_void_p, POINTER(c_int64)),
    "xLock": CFUNCTYPE(c_int, c_void_p, c_int),
    "xUnlock": CFUNCTYPE(c_int, c_void_p, c_int),
    "xCheckReservedLock": CFUNCTYPE(c_int, c_void_p, POINTER(c_int)),
    "xFileControl": CFUNCTYPE(c_int, c_void_p, c_int, c_void_p),
    "xSectorSize": CFUNCTYPE(c_int, c_void_p),
    "xDeviceCharacteristics": CFUNCTYPE(c_int, c_void_p),
}


class _Methods(Structure):
    _fields_ = (("iVersion", c_int), *((name, c_void_p) for name in _METHODS))


def _library() -> ctypes.CDLL:
    """Return the SQLite that the sqlite3 module uses: symbols are looked up in what that module is linked with."""
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    library.sqlite3_vfs_find.restype = POINTER(_VFS)
    library.sqlite3_vfs_find.argtypes = (c_char_p,)
    library.sqlite3_vfs_register.argtypes = (c_void_p, c_int)
    library.sqlite3_vfs_unregister.argtypes = (c_void_p,)
    library.sqlite3_randomness.restype = None
    library.sqlite3_randomness.argtypes = (c_int, c_void_p)
    return library


_LIBRARY: Final = _library()


def _immortal(thing: Any) -> Any:
    """Keep what C code has the address of until after the interpreter's end."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return thing


def _dead_methods() -> _Methods:
    assert _LIBRARY.sqlite3_threadsafe()
    fails = ctypes.cast(_LIBRARY.sqlite3_threadsafe, c_void_p).value
    methods = _Methods(1, *(fails for _ in _METHODS))
    return _immortal(methods)  # type: ignore[no-any-return]  # what goes in comes out


_DEAD: Final = _dead_methods()


class _File:
    """
    :ivar image: what is durable.
    :ivar pending: what is not: offset and data of writes; new size and None of truncations.
    :ivar unnamed: whether its first sync syncs the directory as well.
    :ivar doubtful: whether a sync has failed, so that the file is not what is durable although nothing is pending.
    """

    __slots__ = ("doubtful", "fd", "handles", "image", "path", "pending", "size", "unnamed")

    def __init__(self, path: str, fd: int, unnamed: bool) -> None:
        self.path, self.fd, self.unnamed = path, fd, unnamed
        self.size = os.fstat(fd).st_size
        self.image = bytearray(os.pread(fd, self.size, 0))
        self.pending: list[tuple[int, bytes | None]] = []
        self.handles = 0
        self.doubtful = False

    def is_at_path(self) -> bool:
        """Say whether nobody has renamed or deleted it behind our back."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.fd))


def _apply(image: bytearray, writes: list[tuple[int, bytes | None]]) -> None:
    for offset, data in writes:
        if len(image) < offset:
            image.extend(bytes(offset - len(image)))
        if data is None:
            del image[offset:]
        else:
            image[offset : offset + len(data)] = data


def _write(path: str, content: bytes | bytearray) -> None:
    with open(path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(content)


class Disk:
    """
    The files below one directory. Made by :meth:`FaultyVFS.disk`.

    :ivar operations: writes, truncations, syncs and deletions that were asked for so far. While the hook is asked about
        one of these, that one is counted already.
    :ivar hook: asked before every operation: returns SQLITE_OK, or the error that it is to fail with and do nothing.
        Raises :class:`Crashed`: from then on all fails and changes nothing, until :meth:`crash` is called.
    :ivar capacity: bytes that all files below the directory may take together, others' included; None: any.
    :ivar errors: exceptions of the hook, or of this kit, which for SQLite became I/O errors. A test should look.
    """

    def __init__(self, vfs: FaultyVFS, root: str, random: Random) -> None:
        self.root = root
        self.operations = 0
        self.hook: Callable[[Operation], int] | None = None
        self.capacity: int | None = None
        self.errors: list[BaseException] = []
        self.down = False
        self._vfs = vfs
        self._random = random
        self._files: dict[str, _File] = {}
        self._names: list[tuple[str, _File, bool]] = []

    # -- for tests

    def crash(self, *, power_cut: bool) -> None:
        """
        Kill all open handles for good; new ones work.

        :param power_cut: whether what was not synced is lost, in part or altogether.
        """
        self._kill()
        if power_cut:
            self._cut_power()
        self.down = False

    def copy(self, directory: str, *, power_cut: bool) -> None:
        """
        Make another directory as a crash at this moment would leave this one; nothing happens here.

        For files that are as SQLite left them, and with no directory among them.
        """
        left: dict[str, bytes | bytearray] = {}
        for entry in os.scandir(self.root):
            with open(entry.path, "rb") as plain:
                left[entry.path] = plain.read()
        if power_cut:
            files, images, undone = self._left()
            for file, image in zip(files, images, strict=True):
                if self._files.get(file.path) is file:
                    left[file.path] = image
            for path, file, created in undone:
                if created:
                    left.pop(path, None)
                else:
                    left[path] = images[files.index(file)]
        for path, content in left.items():
            _write(os.path.join(directory, os.path.basename(path)), content)

    def close(self) -> None:
        """Forget the directory; handles that are still open die."""
        self._kill()
        for file in self._known():
            os.close(file.fd)
        self._files.clear()
        self._names.clear()
        self._vfs.forget(self)

    # -- for the VFS

    def asked(self, kind: str, path: str, offset: int, size: int) -> int:
        """Ask the hook; returns the code to fail with, or 0."""
        if self.down:
            return IOERR[kind]
        if self.hook is None:
            return sqlite3.SQLITE_OK
        try:
            return self.hook(Operation(kind, path, offset, size))
        except Crashed:
            self.down = True
            return IOERR[kind]

    def failed(self, kind: str, error: BaseException) -> int:
        """Remember an exception; returns the code to fail with."""
        self.errors.append(error)
        return IOERR[kind]

    def open(self, path: str, flags: int) -> _File:
        """Open or create a file. Raises OSError."""
        file = self._files.get(path)
        if file is not None and not file.is_at_path():
            del self._files[path]
            self._names = [each for each in self._names if each[1] is not file]
            self._let_go(file)
            file = None
        if file is None:
            exists = os.path.exists(path)
            mode = os.O_RDWR if flags & _OPEN_READWRITE else os.O_RDONLY
            if flags & _OPEN_CREATE:
                mode |= os.O_CREAT
            file = _File(path, os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), False)
            self._files[path] = file
            if not exists:
                file.unnamed = bool(flags & _OPEN_SYNCS_NAME)
                self._names.append((path, file, True))
        file.handles += 1
        return file

    def released(self, file: _File) -> None:
        """A handle was closed."""
        file.handles -= 1
        self._let_go(file)

    def has_room(self, growth: int) -> bool:
        """Say whether files may grow by so many bytes."""
        if self.capacity is None:
            return True
        used = 0
        for directory, _, names in os.walk(self.root):
            used += sum(os.stat(os.path.join(directory, name)).st_size for name in names)
        return used + growth <= self.capacity

    def synced(self, file: _File) -> None:
        """A sync was done."""
        _apply(file.image, file.pending)
        file.pending.clear()
        if file.unnamed:
            file.unnamed = False
            self._sync_names(os.path.dirname(file.path))

    def not_synced(self, file: _File) -> None:
        """A sync failed: some of it is durable, and none of the rest will ever be."""
        _apply(file.image, file.pending[: self._random.randint(0, len(file.pending))])
        file.pending.clear()
        file.doubtful = True

    def write_again(self, path: str, genuine: Callable[[str], None]) -> None:
        """Plain code writes a file over itself and syncs it. Raises OSError."""
        try:
            with open(path, "rb") as plain:
                content = plain.read()
        except FileNotFoundError:
            content = b""
        if not content:
            return
        file = self._files.get(path)
        if file is not None and not file.is_at_path():
            file = None
        failure = OSError(errno.EIO, os.strerror(errno.EIO))
        self.operations += 1
        if self.asked("write", path, 0, len(content)) not in (0, sqlite3.SQLITE_FULL):  # it takes no room
            raise failure
        if file is not None:
            file.pending.append((0, content))
        self.operations += 1
        if self.asked("sync", path, 0, 0):
            if file is not None and not self.down:
                self.not_synced(file)
            raise failure
        genuine(path)
        if file is not None:
            self.synced(file)
            file.doubtful = False
            self._let_go(file)

    def delete(self, path: str, sync: bool) -> None:
        """Delete a file. Raises OSError."""
        file = self._files.get(path)
        if file is None or not file.is_at_path():
            file = _File(path, os.open(path, os.O_RDWR | os.O_CLOEXEC), False)
        self._files.pop(path, None)
        os.unlink(path)
        self._names.append((path, file, False))
        if sync:
            self._sync_names(os.path.dirname(path))

    def _sync_names(self, directory: str) -> None:
        settled = [each for each in self._names if os.path.dirname(each[0]) == directory]
        self._names = [each for each in self._names if each not in settled]
        for file in dict.fromkeys(file for _, file, _ in settled):
            self._let_go(file)

    def _kill(self) -> None:
        for file in self._vfs.kill(self):
            file.handles = 0
            self._let_go(file)

    def _let_go(self, file: _File) -> None:
        """Close a file of which nothing has to be remembered."""
        current = self._files.get(file.path) is file
        if (
            file.handles
            or (current and (file.pending or file.doubtful))
            or any(each is file for _, each, _ in self._names)
        ):
            return
        if current:
            del self._files[file.path]
        os.close(file.fd)

    def _cut_power(self) -> None:
        files, images, undone = self._left()
        for file, image in zip(files, images, strict=True):
            os.ftruncate(file.fd, 0)
            os.pwrite(file.fd, image, 0)
        for path, file, created in undone:
            if created:
                if file.is_at_path():
                    os.unlink(path)
            elif not os.path.lexists(path):
                _write(path, images[files.index(file)])
        self._names.clear()
        self._files.clear()
        for file in files:
            os.close(file.fd)

    def _known(self) -> list[_File]:
        return list(dict.fromkeys([*self._files.values(), *(each for _, each, _ in self._names)]))

    def _left(self) -> tuple[list[_File], list[bytearray], list[tuple[str, _File, bool]]]:
        """
        Decide on what a power cut leaves; nothing is changed.

        :return: all files of which not everything may be durable, what is left of each, and which changes of names to
            undo, in this order.
        """
        files = self._known()
        images = []
        for file in files:
            done = self._random.randint(0, len(file.pending))
            image = file.image[:]
            _apply(image, file.pending[:done])
            if done < len(file.pending):
                self._tear(image, *file.pending[done])
            images.append(image)
        return files, images, self._names[self._random.randint(0, len(self._names)) :][::-1]

    def _tear(self, image: bytearray, offset: int, data: bytes | None) -> None:
        """Apply a part of the write that was under way; a truncation is done or not."""
        if data is None:
            return
        part = self._random.randint(0, len(data))
        if self._random.random() < 0.5:
            part -= part % SECTOR
        if part:
            _apply(image, [(offset, data[:part])])
        if self._random.random() < 0.5 and len(image) < offset + len(data):
            image.extend(bytes(offset + len(data) - len(image)))  # a file that has grown, and was not filled


class FaultyVFS:
    """SQLite's way to files while it is installed. There should be one at a time."""

    def __init__(self) -> None:
        self._disks: dict[str, Disk] = {}
        self._handles: dict[int, tuple[Disk, _File]] = {}
        self._original: Any = None
        self._vfs = _VFS()
        self._random = Random(0)
        _immortal(self)

    def install(self) -> None:
        """Become the default."""
        self._original = _LIBRARY.sqlite3_vfs_find(None)
        ctypes.memmove(byref(self._vfs), self._original, ctypes.sizeof(_VFS))
        self._vfs.zName = b"faulty-%d" % next(_numbers)
        self._vfs.pNext = None
        functions = _vfs_functions(self, self._original)
        methods = _methods(self._handles)
        self._callbacks = (functions, methods)
        for name, function in functions.items():
            setattr(self._vfs, name, ctypes.cast(function, c_void_p))
        self._methods = _Methods(1, *(ctypes.cast(each, c_void_p) for each in methods.values()))
        _LIBRARY.sqlite3_vfs_register(byref(self._vfs), 1)
        self._write_again, spool_files.write_again = spool_files.write_again, self._written_again
        atexit.register(self._kill_all)

    def uninstall(self) -> None:
        """
        Restore the old default.

        :raise RuntimeError: a file is open.
        """
        if self._handles:
            raise RuntimeError(f"still open: {[file.path for _, file in self._handles.values()]}")
        for disk in list(self._disks.values()):
            disk.close()
        spool_files.write_again = self._write_again
        _LIBRARY.sqlite3_vfs_unregister(byref(self._vfs))
        _LIBRARY.sqlite3_vfs_register(self._original, 1)
        _LIBRARY.sqlite3_randomness(0, None)
        atexit.unregister(self._kill_all)

    def disk(self, root: str, random: Random) -> Disk:
        """
        Take over all that SQLite has below ``root`` from now on; another disk that had it is closed.

        What SQLite itself takes for random depends from now on ``random`` as well, in the whole process.
        """
        root = os.path.realpath(root)
        if root in self._disks:
            self._disks[root].close()
        disk = self._disks[root] = Disk(self, root, random)
        self._random = random
        _LIBRARY.sqlite3_randomness(0, None)  # the next use asks for a new seed
        return disk

    def disk_of(self, path: str) -> Disk | None:
        """Return whose file ``path`` is."""
        for root, disk in self._disks.items():
            if path.startswith(root) and path[len(root) : len(root) + 1] == "/":
                return disk
        return None

    def opened(self, pointer: int, disk: Disk, file: _File) -> None:
        """Serve the handle at this address."""
        self._handles[pointer] = (disk, file)
        c_void_p.from_address(pointer).value = ctypes.addressof(self._methods)

    def randbytes(self, size: int) -> bytes:
        """Return a seed for SQLite's random numbers."""
        return self._random.randbytes(size)

    def kill(self, disk: Disk) -> list[_File]:
        """Let all that is done through open handles of ``disk`` fail for ever; returns what they had open."""
        killed: dict[_File, None] = {}
        for pointer, (owner, file) in list(self._handles.items()):
            if owner is disk:
                c_void_p.from_address(pointer).value = ctypes.addressof(_DEAD)
                del self._handles[pointer]
                killed[file] = None
        return list(killed)

    def forget(self, disk: Disk) -> None:
        """The disk is closed."""
        self._disks = {root: each for root, each in self._disks.items() if each is not disk}

    def _written_again(self, path: str) -> None:
        if (disk := self.disk_of(path)) is None:
            self._write_again(path)
        else:
            disk.write_again(path, self._write_again)

    def _kill_all(self) -> None:
        for disk in self._disks.values():
            self.kill(disk)


_numbers = count(1)


def _vfs_functions(vfs: FaultyVFS, original: Any) -> dict[str, Any]:
    """Return the functions of the VFS itself. They must not raise: an exception there would read as success."""
    pointer = ctypes.addressof(original.contents)
    original_open = _Open(original.contents.xOpen)
    original_delete = _Delete(original.contents.xDelete)
    original_access = _Access(original.contents.xAccess)

    def x_open(_: int, name: int | None, file: int, flags: int, out: Any) -> int:
        disk = None
        try:
            path = os.fsdecode(ctypes.string_at(name)) if name else ""
            disk = vfs.disk_of(path)
            if disk is None:
                return int(original_open(pointer, name, file, flags, out))
            c_void_p.from_address(file).value = None
            if code := disk.asked("open", path, 0, 0):
                return code
            try:
                opened = disk.open(path, flags)
            except OSError:
                return sqlite3.SQLITE_CANTOPEN
            vfs.opened(file, disk, opened)
            if out:
                out[0] = flags
            return sqlite3.SQLITE_OK
        except BaseException as error:
            return sqlite3.SQLITE_CANTOPEN if disk is None else disk.failed("open", error)

    def x_delete(_: int, name: int, sync: int) -> int:
        disk = None
        try:
            path = os.fsdecode(ctypes.string_at(name))
            disk = vfs.disk_of(path)
            if disk is None:
                return int(original_delete(pointer, name, sync))
            disk.operations += 1
            if code := disk.asked("delete", path, 0, 0):
                return code
            try:
                disk.delete(path, bool(sync))
            except FileNotFoundError:
                return sqlite3.SQLITE_IOERR_DELETE_NOENT
            return sqlite3.SQLITE_OK
        except BaseException as error:
            return sqlite3.SQLITE_IOERR_DELETE if disk is None else disk.failed("delete", error)

    def x_access(_: int, name: int, flags: int, out: Any) -> int:
        try:
            disk = vfs.disk_of(os.fsdecode(ctypes.string_at(name)))
            if disk is not None and disk.down:
                return sqlite3.SQLITE_IOERR_ACCESS
            return int(original_access(pointer, name, flags, out))
        except BaseException:
            return sqlite3.SQLITE_IOERR_ACCESS

    def x_randomness(_: int, size: int, buffer: int) -> int:
        try:
            ctypes.memmove(buffer, vfs.randbytes(size), size)
            return size
        except BaseException:
            return 0

    return {
        "xOpen": _Open(x_open),
        "xDelete": _Delete(x_delete),
        "xAccess": _Access(x_access),
        "xRandomness": _Randomness(x_randomness),
    }


def _methods(handles: dict[int, tuple[Disk, _File]]) -> dict[str, Any]:
    """Return the functions of an open file, guarded one by one where it must be fast."""
    arrays: dict[int, Any] = {}
    string_at, pwrite, preadv, memset = ctypes.string_at, os.pwrite, os.preadv, ctypes.memset
    short_read = sqlite3.SQLITE_IOERR_SHORT_READ

    def failed(pointer: int, kind: str, error: BaseException) -> int:
        handle = handles.get(pointer)
        return IOERR[kind] if handle is None else handle[0].failed(kind, error)

    def x_close(pointer: int) -> int:
        try:
            disk, file = handles[pointer]
            del handles[pointer]
            disk.released(file)
            return 0
        except BaseException as error:
            return failed(pointer, "open", error)

    def x_read(pointer: int, buffer: int, size: int, offset: int) -> int:
        try:
            disk, file = handles[pointer]
            if (disk.hook or disk.down) and (code := disk.asked("read", file.path, offset, size)):
                return code
            array = arrays.get(size)
            if array is None:
                array = arrays[size] = ctypes.c_char * size
            got = preadv(file.fd, (array.from_address(buffer),), offset)
            if got == size:
                return 0
            memset(buffer + got, 0, size - got)
            return short_read
        except BaseException as error:
            return failed(pointer, "read", error)

    def x_write(pointer: int, buffer: int, size: int, offset: int) -> int:
        try:
            disk, file = handles[pointer]
            disk.operations += 1
            if (disk.hook or disk.down) and (code := disk.asked("write", file.path, offset, size)):
                return code
            growth = offset + size - file.size
            if growth > 0:
                if disk.capacity is not None and not disk.has_room(growth):
                    return sqlite3.SQLITE_FULL
                file.size += growth
            data = string_at(buffer, size)
            pwrite(file.fd, data, offset)
            file.pending.append((offset, data))
            return 0
        except BaseException as error:
            return failed(pointer, "write", error)

    def x_truncate(pointer: int, size: int) -> int:
        try:
            disk, file = handles[pointer]
            disk.operations += 1
            if code := disk.asked("truncate", file.path, size, 0):
                return code
            os.ftruncate(file.fd, size)
            file.size = size
            file.pending.append((size, None))
            return 0
        except BaseException as error:
            return failed(pointer, "truncate", error)

    def x_sync(pointer: int, _: int) -> int:
        try:
            disk, file = handles[pointer]
            disk.operations += 1
            if code := disk.asked("sync", file.path, 0, 0):
                if not disk.down:
                    disk.not_synced(file)
                return code
            disk.synced(file)
            return 0
        except BaseException as error:
            return failed(pointer, "sync", error)

    def x_file_size(pointer: int, out: Any) -> int:
        try:
            disk, file = handles[pointer]
            out[0] = file.size
            return sqlite3.SQLITE_IOERR_FSTAT if disk.down else 0
        except BaseException as error:
            return failed(pointer, "read", error)

    def x_lock(pointer: int, _: int) -> int:
        try:
            return sqlite3.SQLITE_IOERR_LOCK if handles[pointer][0].down else 0
        except BaseException as error:
            return failed(pointer, "open", error)

    def x_check_reserved_lock(_: int, out: Any) -> int:
        out[0] = 0
        return 0

    def x_file_control(pointer: int, operation: int, out: int | None) -> int:
        try:
            if operation != _HAS_MOVED:
                return sqlite3.SQLITE_NOTFOUND
            c_int.from_address(out or 0).value = not handles[pointer][1].is_at_path()
            return 0
        except BaseException as error:
            return failed(pointer, "open", error)

    functions = (
        x_close,
        x_read,
        x_write,
        x_truncate,
        x_sync,
        x_file_size,
        x_lock,
        lambda _, __: 0,  # xUnlock
        x_check_reserved_lock,
        x_file_control,
        lambda _: _SECTOR_SIZE,
        lambda _: _POWERSAFE_OVERWRITE,
    )
    return {name: kind(function) for (name, kind), function in zip(_METHODS.items(), functions, strict=True)}
