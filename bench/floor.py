#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The least that a backup program in Python could do.

usage: bench/floor.py read TREE         read every file
       bench/floor.py walk TREE         look at every inode
       bench/floor.py create TREE DIR   make the same files in DIR
       bench/floor.py list TREE FILE    write to FILE which files there are,
                                        those of the same content once
       bench/floor.py pack FILE         read these, and name, deflate and seal
                                        what is in them

The first three in one thread; `pack` in a process for each processor, a MiB at
a time, so that next to nothing of it is Python: HMAC-SHA256, deflate of the
system's zlib at level 2, AES-256-GCM.  It looks for no place to cut at, looks
nothing up, and stores nothing.  What does not shrink at its beginning is not
deflated.

bench/compare.py prints what these take beside the programs' figures.
"""

import hashlib
import hmac
import os
import sys
import zlib

PIECE = 1 << 20             # bytes that are packed at once
TRIED = 1 << 14             # of them, to see whether they shrink
LEVEL = 2                   # of deflate: that of tarsnap.py


def walk(tree):
    """(path, stat) of everything below a directory."""
    todo = [tree]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                yield entry.path, entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)


def data(path):
    """The content of a file in pieces."""
    fd = os.open(path, os.O_RDONLY)
    try:
        while True:
            piece = os.read(fd, 1 << 18)
            if not piece:
                return
            yield piece
    finally:
        os.close(fd)


def create(path, st, target):
    """Make at `target` what is at `path`, with mode and time."""
    kind = st.st_mode & 0o170000
    if kind == 0o040000:
        os.mkdir(target)
    elif kind == 0o120000:
        os.symlink(os.readlink(path), target)
    elif kind == 0o100000:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for piece in data(path):
                os.write(fd, piece)
            os.fchmod(fd, st.st_mode & 0o7777)
            os.utime(fd, ns=(st.st_mtime_ns, st.st_mtime_ns))
        finally:
            os.close(fd)


def different(tree):
    """The regular files of a tree, those of the same content once."""
    seen = set()
    for path, st in walk(tree):
        if st.st_mode & 0o170000 == 0o100000 and st.st_size:
            digest = hashlib.sha256()
            for piece in data(path):
                digest.update(piece)
            if digest.digest() not in seen:
                seen.add(digest.digest())
                yield path


def share(paths, number, count):
    """(path, start, size) of what process `number` of `count` takes: one in
    `count` of the small files, and of the pieces of each large one.
    """
    for at, path in enumerate(paths):
        size = os.stat(path).st_size
        if size > PIECE:
            for start in range(number * PIECE, size, count * PIECE):
                yield path, start, min(PIECE, size - start)
        elif at % count == number:
            yield path, 0, size


def pieces(parts):
    """What share() gives, read one after the other, in pieces of PIECE at
    most.
    """
    buffer = bytearray(PIECE)
    view, filled = memoryview(buffer), 0
    for path, start, size in parts:
        if filled + size > PIECE:
            yield view[:filled]
            filled = 0
        with open(path, 'rb', buffering=0) as file:
            file.seek(start)
            filled += file.readinto(view[filled:filled + size])
    yield view[:filled]


def deflate(piece):
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -15)
    return packer.compress(piece) + packer.flush()


def pack(parts):
    """Name, deflate and seal what share() gives."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    cipher, secret = AESGCM(os.urandom(32)), os.urandom(32)
    for piece in pieces(parts):
        name = hmac.digest(secret, piece, 'sha256')
        if len(deflate(piece[:TRIED])) < len(piece[:TRIED]):
            piece = deflate(piece)
        cipher.encrypt(os.urandom(12), piece, name)


def pack_all(listed):
    """pack() all files of a list, in a process for each processor."""
    with open(listed, 'rb') as file:
        paths = file.read().split(b'\0')[:-1]
    count = (len(os.sched_getaffinity(0))
             if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    pids = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            pack(share(paths, number, count))
            os._exit(0)
        pids.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in pids):
        sys.exit('a process failed')


def main():
    works = {'read': 3, 'walk': 3, 'create': 4, 'list': 4, 'pack': 3}
    if len(sys.argv) != works.get(sys.argv[1] if sys.argv[1:] else None):
        sys.exit(__doc__.split('\n\n')[1])
    work, tree = sys.argv[1:3]
    if work == 'pack':
        return pack_all(tree)
    if work == 'list':
        with open(sys.argv[3], 'wb') as file:
            for path in different(tree):
                file.write(os.fsencode(path) + b'\0')
        return None
    for path, st in walk(tree):
        if work == 'create':
            create(path, st, os.path.join(sys.argv[3],
                                          os.path.relpath(path, tree)))
        elif work == 'read' and st.st_mode & 0o170000 == 0o100000:
            for _ in data(path):
                pass
    return None


if __name__ == '__main__':
    main()
