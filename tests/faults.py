# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Faults by count below a real process, and what a power cut leaves.

faults.c stands between a program and the kernel; here is what arms it and
what reads its log.  `Faults` is the page of memory the two share: which
directories are watched, which calls count, what happens at the n-th.  `Disk`
replays the log: it knows of each file and each directory what was synced, and
writes down the tree that would be found after the power had gone.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))

# What is done at the n-th call (faults.c has the same numbers).
PASS, KILL, AFTER, TORN, FAIL, LATE, HALF, SHORT = range(8)
FOREVER = 256                   # and at all later ones

# Classes of calls.
WRITES, READS, NETWORK = 1, 2, 4

SECTOR = 512                    # bytes a disk writes as one
PAGE = struct.Struct('=QQIIIII')
RECORD = struct.Struct('=c3xHHQqI')
UNDER = 2000                    # bytes for the names of directories
ONLY = 96                       # bytes for what counts alone


def build(where):
    """Compile faults.c into directory `where`; the library's path."""
    library = os.path.join(where, 'faults.so')
    subprocess.run(
        [os.environ.get('CC', 'cc'), '-O2', '-Wall', '-shared', '-fPIC',
         '-o', library, os.path.join(HERE, 'faults.c')], check=True)
    return library


def preload(argv):
    """Run `argv` in place of this process, with faults.c below it."""
    where = tempfile.mkdtemp(prefix='faults-')
    for name in ('state', 'log'):
        with open(os.path.join(where, name), 'wb') as file:
            file.truncate(4096 if name == 'state' else 0)
    os.environ.update(LD_PRELOAD=build(where),
                      FAULTS_STATE=os.path.join(where, 'state'),
                      FAULTS_LOG=os.path.join(where, 'log'))
    sys.stdout.flush()
    os.execv(argv[0], argv)


def mute(on=True):
    """This process is none of those that are watched, where the library is
    below it at all; its children inherit that.
    """
    try:
        ctypes.CDLL(None).faults_mute(int(on))
    except AttributeError:
        pass


class Faults:
    """The shared page of one process and its children."""

    def __init__(self, path):
        self.path = path
        if not os.path.exists(path):
            with open(path, 'wb') as file:
                file.truncate(4096)
        with open(path, 'r+b') as file:
            self.page = mmap.mmap(file.fileno(), 4096)
        self.set()

    def watch(self, *directories):
        """Which directories it is about, by their real paths."""
        names = ''.join(os.path.realpath(path) + '\n'
                        for path in directories).encode()
        assert len(names) < UNDER
        self.page[PAGE.size:PAGE.size + len(names) + 1] = names + b'\0'

    def set(self, at=0, what=PASS, error=0, mask=0, logging=0, only=''):
        """Count from now on, and do `what` at call number `at`.

        `only` 'LETTERS PART': of the calls that have one of these letters,
        on a path with PART in it.  They are those of the log (o open, w
        write, t truncate, f fsync, l link, r rename, u unlink, m mkdir, s
        symlink), and g for a read, S and R for what sends and receives.
        """
        self.page[PAGE.size + UNDER:PAGE.size + UNDER + ONLY] = (
            only.encode().ljust(ONLY, b'\0'))
        self.page[:PAGE.size] = PAGE.pack(0, at, what, error, mask, 0,
                                          logging)

    @property
    def count(self):
        return PAGE.unpack(self.page[:PAGE.size])[0]

    @property
    def hits(self):
        return PAGE.unpack(self.page[:PAGE.size])[5]


##############################################################################
# Disk
##############################################################################


class File:
    """A file: what programs see, what is synced, and the way between."""

    def __init__(self, data=b''):
        self.data = bytearray(data)
        self.synced = bytes(data)
        self.unsynced = []          # (offset, data), or (size, None)

    def write(self, offset, data):
        change(self.data, offset, data)
        self.unsynced.append((offset, data))

    def sync(self):
        if self.unsynced:
            self.synced = bytes(self.data)
            self.unsynced = []

    def left(self, dice):
        """What a power cut leaves; with `dice` more may have arrived: any
        of the writes since, the last of them perhaps in part.
        """
        if dice is None or not self.unsynced:
            return self.synced
        data = bytearray(self.synced)
        for number, (offset, piece) in enumerate(self.unsynced):
            if dice.random() < 0.5:
                continue
            if piece and number == len(self.unsynced) - 1:
                piece = piece[:dice.randrange(len(piece) // SECTOR + 1)
                              * SECTOR]
            change(data, offset, piece)
        return bytes(data)


def change(data, offset, piece):
    """Write `piece` at `offset`; None truncates there."""
    if len(data) < offset:
        data += bytes(offset - len(data))
    if piece is None:
        del data[offset:]
    else:
        data[offset:offset + len(piece)] = piece


class Directory:
    """Names: as programs see them, as synced, and the changes between."""

    def __init__(self):
        self.names = {}             # name -> File, Directory or str (link)
        self.synced = {}
        self.unsynced = []          # [(name, what or None to remove), ...]

    def change(self, *changes):
        """Names that change together or not at all."""
        for name, what in changes:
            put(self.names, name, what)
        self.unsynced.append(changes)

    def sync(self):
        self.synced = dict(self.names)
        self.unsynced = []

    def left(self, dice):
        """The names after a power cut; with `dice`, the first of the
        changes since may have arrived: a journal keeps their order.
        """
        names = dict(self.synced)
        if dice is not None:
            for changes in self.unsynced[:dice.randrange(
                    len(self.unsynced) + 1)]:
                for name, what in changes:
                    put(names, name, what)
        return names


def put(names, name, what):
    if what is None:
        names.pop(name, None)
    else:
        names[name] = what


class Disk:
    """Some directories as a log of faults.c says they fared.

    What is there at first counts as synced.
    """

    def __init__(self, *roots):
        self.roots = {os.path.realpath(root): None for root in roots}
        self.inodes = {}            # number -> File
        for root in self.roots:
            self.take(root)

    def take(self, root):
        """`root` is as it is on the real disk, and synced."""
        self.roots[root] = self.load(root, {})

    def load(self, path, seen):
        directory = Directory()
        for entry in os.scandir(path):
            st = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(st.st_mode):
                what = self.load(entry.path, seen)
            elif stat.S_ISLNK(st.st_mode):
                what = os.readlink(entry.path)
            elif st.st_ino in seen:
                what = seen[st.st_ino]
            else:
                with open(entry.path, 'rb') as file:
                    what = seen[st.st_ino] = File(file.read())
                self.inodes[st.st_ino] = what
            directory.change((entry.name, what))
        directory.sync()
        return directory

    def find(self, path):
        """(the Directory that has it, its name in there)"""
        for root, node in self.roots.items():
            if path.startswith(root + '/'):
                *above, name = [x for x in path[len(root):].split('/')
                                if x not in ('', '.')]
                for part in above:
                    node = node.names.get(part)
                    if not isinstance(node, Directory):
                        raise KeyError(path)
                return node, name
        raise KeyError(path)

    def directory(self, path):
        """The Directory of this path, or None."""
        if path in self.roots:
            return self.roots[path]
        try:
            above, name = self.find(path)
        except KeyError:
            return None
        found = above.names.get(name)
        return found if isinstance(found, Directory) else None

    def apply(self, op, path, path2, ino, offset, data):
        """One line of the log."""
        if op in 'wtf':
            found = self.directory(path) if op == 'f' else None
            found = found or self.inodes.get(ino)
            if found is None:
                return              # unlinked long ago
            if op == 'f':
                found.sync()
            else:
                found.write(offset, data if op == 'w' else None)
            return
        above, name = self.find(path2 if op in 'lr' else path)
        if op in 'oO':
            if name not in above.names:
                self.inodes[ino] = File()
                above.change((name, self.inodes[ino]))
            elif op == 'O':
                self.inodes[ino].write(0, None)
        elif op == 'm':
            above.change((name, Directory()))
        elif op == 's':
            above.change((name, path2))
        elif op == 'u':
            above.change((name, None))
        else:
            source, old = self.find(path)
            moved = source.names[old]
            if op == 'l':
                above.change((name, moved))
            elif source is above:
                above.change((name, moved), (old, None))
            else:
                above.change((name, moved))
                source.change((old, None))

    def leave(self, root, dice=None, now=False):
        """Make directory `root` what a power cut leaves of it (with `now`,
        what programs see), and take that as what is there from now on.
        """
        root = os.path.realpath(root)
        node = self.roots[root]
        for name in os.listdir(root):
            path = os.path.join(root, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        self.write(node, root, dice, now, {})

    def write(self, node, where, dice, now, made):
        names = node.names if now else node.left(dice)
        for name, what in names.items():
            path = os.path.join(where, name)
            if isinstance(what, str):
                os.symlink(what, path)
            elif isinstance(what, Directory):
                os.mkdir(path, 0o700)
                self.write(what, path, dice, now, made)
            elif name.endswith('-shm'):
                continue            # SQLite's shared memory
            elif what in made:
                os.link(made[what], path)
            else:
                made[what] = path
                with open(path, 'wb', opener=private) as file:
                    file.write(what.data if now else what.left(dice))


def private(path, flags):
    return os.open(path, flags, 0o600)


class Log:
    """The log of faults.c, read as far as it has come."""

    def __init__(self, path):
        self.path = path
        self.place = 0

    def mark(self, text):
        """Write down something that has happened."""
        raw = os.fsencode(text)
        with open(self.path, 'ab') as file:
            file.write(RECORD.pack(b'!', len(raw), 0, 0, 0, 0) + raw)

    def skip(self):
        """What was logged so far is of no interest."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.path, 0)
        self.place = 0

    def records(self):
        """(op, path, path2, ino, offset, data) of what is new."""
        with open(self.path, 'rb') as file:
            file.seek(self.place)
            raw = file.read()
        pos = 0
        while pos + RECORD.size <= len(raw):
            op, one, two, ino, offset, length = RECORD.unpack_from(raw, pos)
            start, end = pos + RECORD.size, pos + RECORD.size + one + two
            if end + length > len(raw):
                break
            yield (op.decode(), os.fsdecode(raw[start:start + one]),
                   os.fsdecode(raw[start + one:end]), ino, offset,
                   raw[end:end + length])
            pos = end + length
        self.place += pos
