# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""-r: GNU tar and Python's tarfile make of the stream what -x makes of the
archive."""

import contextlib
import hashlib
import io
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import unittest

import storefake
import tarsnap
from tarsnap import CHARDEV, DIRECTORY, FIFO, SYMLINK

ROOT = os.geteuid() == 0
S = 10 ** 9


def tree(top):
    """path -> what can be seen of it, links of files included."""
    out, inodes = {}, {}
    top = os.fsencode(top)
    for directory, below, files in os.walk(top):
        for name in below + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content = b''
            if stat.S_ISREG(status.st_mode):
                with open(path, 'rb') as file:
                    content = hashlib.sha256(file.read()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False)
                      for key in os.listxattr(path, follow_symlinks=False)}
            first = path
            if not stat.S_ISDIR(status.st_mode):
                first = inodes.setdefault(status.st_ino, path)
            out[os.path.relpath(path, top)] = (
                status.st_mode, status.st_uid, status.st_gid,
                status.st_mtime_ns, status.st_rdev, content, xattrs,
                os.path.relpath(first, top))
    return out


class TarCase(unittest.TestCase):

    def setUp(self):
        self.base = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.base)
        self.stream = os.path.join(self.base, 'stream.tar')
        self.store = storefake.Store()
        self.builder = storefake.Builder(self.store)

    def add(self, *args, **fields):
        self.builder.add(*args, **fields)
        return self

    def directory(self, name):
        path = os.path.join(self.base, name)
        os.mkdir(path)
        return path

    def tar(self, mangle=None, complete=True, link=True):
        """Write the stream; (errors, stderr)."""
        if link:
            self.builder.finish(complete, ordered=False)
        remote = storefake.FakeRemote(self.store, mangle)
        saved = os.dup(1)
        fd = os.open(self.stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.close(fd)
        try:
            with contextlib.redirect_stderr(io.StringIO()) as err:
                errors = tarsnap.mode_tar(remote, storefake.options())
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        return errors, err.getvalue()

    def extracted(self):
        """The tree that -x makes."""
        path = self.directory('x')
        errors = tarsnap.mode_extract(
            storefake.FakeRemote(self.store), storefake.options(
                directories=[os.fsencode(path)], perms=True))
        self.assertEqual(errors, 0)
        return tree(path)

    def by_gnu_tar(self):
        path = self.directory('gnu')
        done = subprocess.run(
            ['tar', '-xpf', self.stream, '-C', path, '--xattrs',
             '--xattrs-include=*'], capture_output=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        for line in done.stderr.splitlines():
            # Harmless: it does not know hdrcharset, and doubts some times.
            self.assertRegex(line, b"keyword 'hdrcharset'|implausibly old "
                             b"time stamp|in the future")
        return tree(path)

    def by_tarfile(self):
        """By Python's tarfile, which leaves extended attributes out."""
        path = self.directory('py')
        with tarfile.open(self.stream, encoding='utf-8',
                          errors='surrogateescape') as tar:
            if sys.version_info >= (3, 12):
                tar.extractall(path, filter='fully_trusted')
            else:
                tar.extractall(path)
        return tree(path)


def without(found, *fields):
    return {path: tuple(value for number, value in enumerate(row)
                        if number not in fields)
            for path, row in found.items()}


MTIME, XATTRS = 3, 6


class SameTest(TarCase):

    def test_same_result(self):
        rng = random.Random(2)
        self.add(b'd', DIRECTORY, mode=0o750, mtime=11 * S)
        self.add(b'd/a', data=rng.randbytes(70000), mtime=12 * S + 345)
        self.add(b'd/empty', mode=0o600)
        self.add(b'd/' + b'long' * 60, data=b'1')
        self.add(b'd/' + b'x' * 120 + b'/' + b'y' * 120, data=b'2')
        self.add(b'd/l', SYMLINK, target=b'a')
        self.add(b'd/ll', SYMLINK, target=b't' * 300)
        self.add(b'd/p', FIFO, mode=0o640)
        self.add('d/\u00e9\u4e2d'.encode(), data=b'3')
        self.add(b'd/\xff\xfe\n', data=b'4')
        self.add(b'd/\xffl', SYMLINK, target=b'\xfe')
        self.add(b'd/old', data=b'5', mtime=1 * S)
        self.add(b'h1', data=b'same', link=(4, 0))
        self.add(b'h2', data=b'same', link=(4, 0))
        self.add(b'h3', data=b'same', link=(4, 0))
        self.add(b'many', parts=[rng.randbytes(700) for _ in range(300)])
        self.add(b'rep', parts=[(b'abc' * 5, 3000), b'z'])
        if ROOT:
            self.add(b'own', data=b'6', uid=3000000, gid=2200000)
            self.add(b's', data=b'6', mode=0o4755, uid=5, gid=6)
        self.assertEqual(self.tar(), (0, ''))
        expected = self.extracted()
        parent = b'd/' + b'x' * 120     # not in the archive: has no time
        for found in (self.by_gnu_tar(), self.by_tarfile()):
            self.assertEqual(set(found), set(expected))
            for path in expected:
                if path == parent:
                    continue
                got, want = list(found[path]), list(expected[path])
                for row in (got, want):
                    # tarfile sets times as floating seconds, and none of
                    # symbolic links.
                    row[MTIME] = not stat.S_ISLNK(row[0]) \
                        and row[MTIME] // 1000
                self.assertEqual(got, want, path)

    def test_nanoseconds_and_the_past(self):
        times = {b'a': 1234567890123456789, b'b': -5 * S + 7, b'c': 0,
                 b'd': 2 ** 33 * S + 1}
        for path in times:
            self.add(path, data=b'1', mtime=times[path])
        self.assertEqual(self.tar(), (0, ''))
        found = self.by_gnu_tar()
        self.assertEqual({path: found[path][MTIME] for path in times}, times)

    def test_attributes(self):
        try:
            os.setxattr(self.base, b'user.test', b'1')
        except OSError:
            self.skipTest('no user attributes here')
        big = b'\xff' * 1500
        values = ((b'user.a', b'1'), (b'user.b', b'\0\xff\n=x'),
                  (b'user.big', big))
        self.add(b'd', DIRECTORY, xattrs=values)
        self.add(b'f', data=b'1', xattrs=values)
        self.assertEqual(self.tar(), (0, ''))
        expected = self.extracted()
        self.assertEqual(expected[b'f'][XATTRS]['user.b'], b'\0\xff\n=x')
        self.assertEqual(self.by_gnu_tar(), expected)

    def test_holes(self):
        big = 4 << 20
        rng = random.Random(4)
        self.add(b'a', parts=[big, b'x' * 5000, 4096, b'y' * 10])
        self.add(b'b', parts=[rng.randbytes(100), big])
        self.add(b'c', parts=[big])
        self.add(b'd' * 150, parts=[big, b'1'])
        self.add(b'd2', parts=[rng.randrange(1, 1500) if number % 2 else
                               rng.randbytes(rng.randrange(1, 1500))
                               for number in range(90)])
        self.add(b'd3', parts=[rng.randrange(1, 1500) if number % 2 == 0
                               else rng.randbytes(rng.randrange(1, 1500))
                               for number in range(7)])
        self.add(b'd4', parts=[513, b'x', 511, b'y', 1023, (b'z', 600), 9])
        self.add(b'e', parts=[4096 if number % 2 else rng.randbytes(4096)
                              for number in range(200)])
        self.add(b'f', data=b'after')
        self.assertEqual(self.tar(), (0, ''))
        self.assertLess(os.stat(self.stream).st_size, 1 << 20)
        expected = self.extracted()
        self.assertEqual(self.by_gnu_tar(), expected)
        self.assertEqual(without(self.by_tarfile(), MTIME),
                         without(expected, MTIME))
        for name in ('a', 'b', 'c'):
            self.assertLess(os.stat(os.path.join(
                self.base, 'gnu', name)).st_blocks, 200)

    @unittest.skipUnless(ROOT, 'needs root')
    def test_devices(self):
        self.add(b'c', CHARDEV, device=(1, 3), mode=0o666)
        self.add(b'b', tarsnap.BLOCKDEV, device=(300, 70000))
        self.assertEqual(self.tar(), (0, ''))
        with tarfile.open(self.stream) as tar:
            self.assertEqual(
                [(info.type, info.devmajor, info.devminor) for info in tar],
                [(tarfile.CHRTYPE, 1, 3), (tarfile.BLKTYPE, 300, 70000)])

    def test_a_hard_link_is_one(self):
        for name in (b'a', b'b'):
            self.add(name, data=b'12345', link=(3, 0))
        self.add(b'c', data=b'12345', link=(3, 0), mtime=1)
        self.assertEqual(self.tar(), (0, ''))
        with tarfile.open(self.stream) as tar:
            self.assertEqual(
                [(info.name, info.type, info.size, info.linkname)
                 for info in tar],
                [('a', tarfile.REGTYPE, 5, ''),
                 ('b', tarfile.LNKTYPE, 0, 'a'),
                 ('c', tarfile.REGTYPE, 5, '')])


class EdgeTest(TarCase):

    def test_empty_archive_is_a_tar_file(self):
        self.assertEqual(self.tar(), (0, ''))
        with open(self.stream, 'rb') as file:
            self.assertEqual(file.read(), bytes(10240))

    def test_ends_in_two_zero_blocks(self):
        self.add(b'a', data=b'x' * 700)
        self.tar()
        with open(self.stream, 'rb') as file:
            data = file.read()
        self.assertEqual(len(data) % 10240, 0)
        self.assertEqual(data[512 + 1024:], bytes(len(data) - 1536))

    def test_a_lost_chunk_leaves_a_stream_that_can_be_read(self):
        parts = [bytes([number]) * 1000 for number in range(1, 11)]
        lost = self.store.names.chunk(parts[4])
        self.add(b'a', parts=parts).add(b'b', data=b'after')
        errors, text = self.tar(lambda name, block:
                                None if name == lost else block)
        self.assertEqual(errors, 1)
        self.assertTrue(text.startswith('a: block'), text)
        parts[4] = bytes(1000)
        with tarfile.open(self.stream) as tar:
            self.assertEqual(tar.extractfile('a').read(), b''.join(parts))
            self.assertEqual(tar.extractfile('b').read(), b'after')

    def test_truncated_archive(self):
        self.add(b'a', data=b'1')
        errors, text = self.tar(complete=False)
        self.assertEqual(errors, 1)
        self.assertTrue(text.startswith('tarsnap: Truncated input file\n'))

    def test_reader_that_goes_away(self):
        self.add(b'a', data=bytes(300000))
        self.builder.finish()
        reader, writer = os.pipe()
        os.close(reader)
        saved = os.dup(1)
        os.dup2(writer, 1)
        try:
            with self.assertRaisesRegex(tarsnap.UserError, 'Broken pipe'):
                tarsnap.mode_tar(storefake.FakeRemote(self.store),
                                 storefake.options())
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            os.close(writer)


if __name__ == '__main__':
    unittest.main()
