# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""-t and --list-archives, to the byte."""

import contextlib
import io
import os
import tempfile
import time
import unittest
from unittest import mock

import storefake
import tarsnap
from tarsnap import BLOCKDEV, CHARDEV, DIRECTORY, FIFO, SYMLINK

S = 10 ** 9
NOW = 1700000000            # 2023-11-14 22:13:20 UTC
ACL = ((b'system.posix_acl_access', b'x'),)


class ListCase(unittest.TestCase):

    def setUp(self):
        self.store = storefake.Store()
        self.builder = storefake.Builder(self.store)
        patch = mock.patch.object(tarsnap.time, 'time', lambda: NOW)
        patch.start()
        self.addCleanup(patch.stop)
        zone = mock.patch.dict(os.environ, {'TZ': 'UTC'})
        zone.start()
        time.tzset()
        self.addCleanup(time.tzset)
        self.addCleanup(zone.stop)

    def add(self, *args, **fields):
        self.builder.add(*args, **fields)
        return self

    def run_mode(self, mode, fd=1, mangle=None, **given):
        """What a mode writes to `fd`; errors and stderr into self."""
        self.remote = storefake.FakeRemote(self.store, mangle)
        with tempfile.TemporaryFile() as file:
            saved = os.dup(fd)
            os.dup2(file.fileno(), fd)
            try:
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    self.errors = mode(self.remote,
                                       storefake.options(**given))
            finally:
                os.dup2(saved, fd)
                os.close(saved)
            self.text = err.getvalue()
            file.seek(0)
            return file.read()

    def list(self, **given):
        if self.builder.waiting or self.builder.pages:
            self.builder.finish()
            self.builder.waiting, self.builder.pages = [], []
        return self.run_mode(tarsnap.mode_list, **given)


class ContentsTest(ListCase):

    def test_paths(self):
        self.add(b'd', DIRECTORY).add(b'd/f', data=b'1').add(
            b'd/l', SYMLINK, target=b'f').add(b'e')
        self.assertEqual(self.list(), b'd/\nd/f\nd/l\ne\n')
        self.assertEqual((self.errors, self.text), (0, ''))
        self.assertEqual(self.list(null_output=True),
                         b'd/\0d/f\0d/l\0e\0')

    def test_long_lines(self):
        self.add(b'Documents/.DS_Store', data=b'x' * 26628, uid=501, gid=20,
                 mtime=1566844246 * S)
        self.assertEqual(
            self.list(verbose=1, iso_dates=True),
            b'-rw-r--r--  0 501    20      26628 2019-08-26 18:30:46 '
            b'Documents/.DS_Store\n')
        self.assertEqual(
            self.list(verbose=1),
            b'-rw-r--r--  0 501    20      26628 Aug 26  2019 '
            b'Documents/.DS_Store\n')

    def test_types_and_modes(self):
        self.add(b'a', mode=0o4755).add(b'b', mode=0o2644)
        self.add(b'c', mode=0o1777).add(b'd', DIRECTORY, mode=0o1776)
        self.add(b'e', SYMLINK, mode=0o777, target=b't o')
        self.add(b'f', FIFO, mode=0).add(b'g', CHARDEV, device=(1, 3))
        self.add(b'h', BLOCKDEV, device=(259, 65536))
        self.add(b'i', xattrs=ACL).add(b'j', mode=0o4644)
        lines = self.list(verbose=1).splitlines()
        self.assertEqual([line[:13] for line in lines], [
            b'-rwsr-xr-x  0', b'-rw-r-Sr--  0', b'-rwxrwxrwt  0',
            b'drwxrwxrwT  0', b'lrwxrwxrwx  0', b'p---------  0',
            b'crw-r--r--  0', b'brw-r--r--  0', b'-rw-r--r--+ 0',
            b'-rwSr--r--  0'])
        self.assertEqual(lines[6], b'crw-r--r--  0 0      0         1,3 '
                                   b'Nov 14 22:13 g')
        self.assertEqual(lines[7], b'brw-r--r--  0 0      0   259,65536 '
                                   b'Nov 14 22:13 h')
        self.assertTrue(lines[4].endswith(b' e -> t o'))
        self.assertTrue(lines[3].endswith(b' d/'))

    def test_columns_grow_and_stay(self):
        self.add(b'a', uname=b'me', gname=b'us', data=b'12')
        self.add(b'b', uname=b'longername', gname=b'averylonggroup',
                 data=b'123')
        self.add(b'c', uname=b'me', gname=b'us', data=b'1')
        self.assertEqual(self.list(verbose=1, iso_dates=True).splitlines(), [
            b'-rw-r--r--  0 me     us          2 2023-11-14 22:13:20 a',
            b'-rw-r--r--  0 longername averylonggroup 3 2023-11-14 22:13:20 '
            b'b',
            b'-rw-r--r--  0 me         us             1 2023-11-14 22:13:20 '
            b'c'])
        self.assertEqual(
            self.list(verbose=1, numeric_owner=True).splitlines()[1],
            b'-rw-r--r--  0 0      0           3 Nov 14 22:13 b')

    def test_dates(self):
        year = 365 * 86400
        for number, ago in enumerate((0, year // 2 - 60, year // 2 + 60,
                                      60 - year // 2, -60 - year // 2)):
            self.add(b'%d' % number, mtime=(NOW - ago) * S)
        self.add(b'5', mtime=(NOW - 10 * 86400) * S)
        self.add(b'6', mtime=-1).add(b'7', mtime=2 ** 62 * S)
        lines = self.list(verbose=1).splitlines()
        self.assertEqual([line[35:47] for line in lines[:7]], [
            b'Nov 14 22:13', b'May 16 10:14', b'May 16  2023',
            b'May 15 10:12', b'May 15  2024', b'Nov  4 22:13',
            b'Dec 31  1969'])
        self.assertIn(b'4611686018427387904', lines[7])

    def test_local_time(self):
        self.add(b'a')
        with mock.patch.dict(os.environ, {'TZ': 'XYZ-3'}):
            time.tzset()
            self.assertIn(b' 2023-11-15 01:13:20 a\n',
                          self.list(verbose=1, iso_dates=True))

    def test_hard_links(self):
        link = {'data': b'12345', 'link': (3, 0)}
        self.add(b'a', **link).add(b'b', **link).add(b'c', **link)
        self.add(b'd', data=b'54321', link=(3, 0))
        tail = [line[24:34] + line[48:]
                for line in self.list(verbose=1).splitlines()]
        self.assertEqual(tail, [
            b'         5a', b'         0b link to a', b'         0c link to a',
            b'         5d'])
        lines = self.list(verbose=1, operands=[b'b', b'c']).splitlines()
        self.assertEqual([line[:1] for line in lines], [b'-', b'h'])
        self.assertTrue(lines[1].endswith(b' c link to b'))

    def test_names_are_escaped_unless_utf_8(self):
        self.add(b'\x1b[1m\n\\').add('\u00e9\u4e2d'.encode()).add(b'\xff ')
        self.add(b'l', SYMLINK, target=b'\t\xfe')
        self.assertEqual(self.list(), b'\\033[1m\\n\\\\\n\xc3\xa9\xe4\xb8\xad'
                                      b'\n\\377 \nl\n')
        self.assertTrue(self.list(verbose=1).endswith(b' l -> \\t\\376\n'))
        self.assertEqual(self.list(null_output=True)[:7],
                         b'\x1b[1m\n\\\0')

    def test_null_fields(self):
        self.add(b'a b', data=b'12', uname=b'me', gname=b'us')
        self.assertEqual(
            self.list(verbose=1, null_output=True, iso_dates=True),
            b'-rw-r--r--\0\x000\0\0me\0\0us\0\x002\0\0'
            b'2023-11-14 22:13:20\0\0a b\0')

    def test_footer(self):
        self.add(b'a')
        self.assertEqual(self.list(verbose=2).splitlines()[1:],
                         [b'Archive Format: tarsnap-archive-1'])

    def test_O_lists_on_stderr(self):
        self.add(b'a')
        self.assertEqual(self.list(to_stdout=True, fd=2), b'a\n')

    def test_patterns(self):
        self.add(b'd', DIRECTORY).add(b'd/a').add(b'd/b').add(b'e')
        self.assertEqual(self.list(operands=[b'd'], exclude=[b'b']),
                         b'd/\nd/a\n')
        self.assertEqual(self.list(operands=[b'd', b'x']),
                         b'd/\nd/a\nd/b\n')
        self.assertEqual((self.errors, self.text),
                         (1, 'tarsnap: x: Not found in archive\n'))
        self.assertEqual(self.list(operands=[b'd'], fast_read=True),
                         b'd/\nd/a\nd/b\n')
        self.assertEqual(self.list(strip_components=1), b'a\nb\n')
        self.assertEqual(self.list(newer=lambda entry: entry.path == b'e'),
                         b'e\n')

    def test_only_pages_are_fetched(self):
        for number in range(40):
            self.add(b'%02d' % number, data=b'%d' % number)
        self.list()
        self.assertEqual(self.remote.sent, 1 + 10 + 3)

    def test_a_lost_page(self):
        for number in range(12):
            self.add(b'%02d' % number)
        lost = self.builder.pages[1][0].name
        found = self.list(mangle=lambda name, block:
                          None if name == lost else block)
        self.assertEqual(found.split(), [b'%02d' % number for number in
                                         (0, 1, 2, 3, 8, 9, 10, 11)])
        self.assertEqual(self.errors, 1)
        self.assertIn(lost.hex()[:16], self.text)

    def test_truncated(self):
        self.add(b'a')
        self.builder.finish(complete=False)
        self.builder.waiting, self.builder.pages = [], []
        self.assertEqual(self.list(), b'a\n')
        self.assertEqual(self.errors, 1)

    def test_no_such_archive(self):
        with self.assertRaisesRegex(tarsnap.UserError,
                                    '^Archive does not exist: zzz$'):
            self.list(names=[b'zzz'])


class ArchivesTest(ListCase):

    def archive(self, title, created, argv=(b'tarsnap', b'-c'), **given):
        storefake.Builder(self.store, title).add(title).finish(
            created=created, argv=argv, **given)
        return self.store.names.archive(title).hex().encode()

    def archives(self, **given):
        given.setdefault('names', [])
        return self.run_mode(tarsnap.mode_list_archives, **given)

    def test_nothing(self):
        self.assertEqual(self.archives(), b'')
        self.assertEqual(self.errors, 0)

    def test_by_date_then_name(self):
        for title, created in ((b'z', 5), (b'a', 7), (b'c', 6), (b'b', 6)):
            self.archive(title, created)
        self.assertEqual(self.archives(), b'z\nb\nc\na\n')

    def test_each_column(self):
        one = self.archive(b'my backup', NOW,
                           [b'tarsnap', b'-c', b'-f', b'my backup', b'/'])
        date = b'2023-11-14 22:13:20'
        command = b'tarsnap -c -f my backup /'
        for given, line in (
                ({}, b'my backup\n'),
                ({'verbose': 1}, b'my backup\t' + date + b'\n'),
                ({'verbose': 2}, b'my backup\t' + date + b'\t' + command
                 + b'\n'),
                ({'hashes': True}, one + b'\n'),
                ({'hashes': True, 'verbose': 1},
                 one + b'\tmy backup\t' + date + b'\n'),
                ({'hashes': True, 'verbose': 2},
                 one + b'\tmy backup\t' + date + b'\t' + command + b'\n'),
                ({'null_output': True}, b'my backup\0'),
                ({'null_output': True, 'verbose': 2},
                 b'my backup\0\0' + date + b'\0\0'
                 + command.replace(b' -', b'\0\0\0-').replace(
                     b'f my', b'f\0\0\0my').replace(b' /', b'\0\0\0/')
                 + b'\0')):
            self.assertEqual(self.archives(**given), line)
            self.assertEqual((self.errors, self.text), (0, ''))

    def test_some_by_hash(self):
        one, two = self.archive(b'one', 1), self.archive(b'two', 2)
        self.archive(b'three', 3)
        self.assertEqual(self.archives(hashes=True, names=[two, one]),
                         one + b'\n' + two + b'\n')
        self.assertEqual(self.archives(hashes=True,
                                       names=[one, b'ab' * 32, b'xyz']),
                         one + b'\n')
        self.assertEqual(self.errors, 2)
        self.assertIn('xyz: Not the hash of a name', self.text)

    def test_partial_archives_are_there(self):
        self.archive(b'one.part', 1, complete=False)
        self.assertEqual(self.archives(), b'one.part\n')

    def test_a_thousand_in_a_few_requests(self):
        titles = [b'archive-%04d' % number for number in range(1000)]
        for title in titles:
            self.archive(title, NOW)
        self.assertEqual(self.archives().split(), titles)
        self.assertLess(self.remote.gets, 10)

    def test_a_lost_record(self):
        for title in (b'a', b'b', b'c'):
            self.archive(title, NOW)
        lost = self.store.live[self.store.names.archive(b'b')][0]
        found = self.archives(mangle=lambda name, block:
                              None if name == lost else block)
        self.assertEqual(found, b'a\nc\n')
        self.assertEqual(self.errors, 1)
        self.assertIn(lost.hex()[:16], self.text)


if __name__ == '__main__':
    unittest.main()
