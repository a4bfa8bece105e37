#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The client, with files of any size whose bytes are never read.

usage: bench/simulate.py DIR CLIENT'S ARGUMENTS

For bench/growth.py: a store as of 1 000 GB is made in minutes, out of sparse
files.  A file above 32 KB is cut every 80 KiB, the mean of the real rule; the
name of a chunk is a hash of where it is, and what is stored of it is 112
random bytes in the shape of a sealed block.  All else is the program in DIR,
unchanged: pages, lists, the cache directory, the transaction, the server.
"""

import hashlib
import os
import struct
import sys

CHUNK = 80 << 10


def simulate(tarsnap):
    """Replace what reads and seals file data."""
    sealed = (b'\x01c\x01' + os.urandom(32) + struct.pack('>BI', 1, 72)
              + os.urandom(72))
    place = struct.Struct('>QQ')

    def read(reader, fd, st):
        reader.inode = st.st_ino
        return real(reader, fd, st)

    def read_range(reader, _, start, end, content):
        """The chunks of a file, as FileReader.read_range() makes them."""
        writer, sink = reader.writer, reader.writer.sink
        for pos in range(start, end, CHUNK):
            name = hashlib.sha256(place.pack(reader.inode, pos)).digest()
            size = min(CHUNK, end - pos)
            if sink.claim(name, tarsnap.CHUNK, size) is None:
                writer.put(sealed, name, tarsnap.CHUNK, size)
            reader.extent(content, tarsnap.Ref(name, size), 0, size)
            writer.step(size)
        return end - start

    real, tarsnap.FileReader.read = tarsnap.FileReader.read, read
    tarsnap.FileReader.read_range = read_range
    tarsnap.FileReader.sparse = lambda *_: False


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__.split('\n\n')[1])
    sys.path[0] = sys.argv[1]
    import tarsnap
    simulate(tarsnap)
    sys.exit(tarsnap.main(['tarsnap'] + sys.argv[2:]))


if __name__ == '__main__':
    main()
