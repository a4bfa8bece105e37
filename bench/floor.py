#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The least that a backup program in one thread of Python could do.

usage: bench/floor.py read TREE         read every file
       bench/floor.py walk TREE         look at every inode
       bench/floor.py create TREE DIR   make the same files in DIR

bench/compare.py prints what these take beside the programs' figures.
"""

import os
import sys


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


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ('read', 'walk', 'create'):
        sys.exit(__doc__.split('\n\n')[1])
    work, tree = sys.argv[1:3]
    for path, st in walk(tree):
        if work == 'create':
            create(path, st, os.path.join(sys.argv[3],
                                          os.path.relpath(path, tree)))
        elif work == 'read' and st.st_mode & 0o170000 == 0o100000:
            for _ in data(path):
                pass


if __name__ == '__main__':
    main()
