"""The output and the working directory of a sandboxed job, seen from the worker: nothing in them is
a trap.
"""

import errno
import mmap
import os
import stat

FILE_BYTES = 16 << 20  # the largest file of one job
TOTAL_BYTES = 32 << 20  # of all files in the directory
FILES = 1000


class Scratch:
    """A directory on a descriptor. Every access is relative to it, follows no link and waits for
    nothing.
    """

    def __init__(self, path: str):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def text_of(self, name: str) -> str:
        """The first 4 KiB of the plain file of that name; "" for a link, FIFO, device or directory,
        or if there is none.
        """
        try:
            file = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.descriptor
            )
        except OSError:
            return ""
        try:
            status = os.fstat(file)
            plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            return os.read(file, 4096).decode("utf-8", "replace") if plain else ""
        finally:
            os.close(file)

    def overfull(self) -> bool:
        """Is there more than `TOTAL_BYTES` or `FILES`, or any directory? (Nothing needs one, and
        one would have to be searched.)
        """
        names, total = os.listdir(self.descriptor), 0
        if len(names) > FILES:
            return True
        for name in names:
            try:
                status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue
            total += status.st_size
            if stat.S_ISDIR(status.st_mode) or total > TOTAL_BYTES:
                return True
        return False

    def empty(self) -> None:
        """Remove everything; directories are flattened into this one first, so that their depth
        does not matter.

        OSError, and nothing beyond is touched, at a directory that is the root of another file
        system.
        """
        os.fchmod(self.descriptor, 0o700)  # its owner may have changed it
        device = os.fstat(self.descriptor).st_dev
        serial = 0
        while names := os.listdir(self.descriptor):
            for name in names:
                try:
                    os.unlink(name, dir_fd=self.descriptor)
                except (IsADirectoryError, PermissionError):
                    os.chmod(name, 0o700, dir_fd=self.descriptor)
                    inner = os.open(
                        name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.descriptor
                    )
                    if os.fstat(inner).st_dev != device:
                        raise OSError(errno.EXDEV, "a file system is mounted there") from None
                    for entry in os.listdir(inner):
                        serial += 1
                        os.rename(
                            entry,
                            f".{serial}.{os.getpid()}",
                            src_dir_fd=inner,
                            dst_dir_fd=self.descriptor,
                        )
                    os.close(inner)
                    os.rmdir(name, dir_fd=self.descriptor)


def contains(output: int, phrase: str) -> bool:
    """Is the phrase in the first `FILE_BYTES` of the file on this descriptor? "" is in none."""
    size = min(os.fstat(output).st_size, FILE_BYTES)
    if not phrase or not size:
        return False
    with mmap.mmap(output, size, access=mmap.ACCESS_READ) as text:
        return text.find(phrase.encode()) >= 0
