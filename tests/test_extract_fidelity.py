# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Extraction gives back what went in, and says what it could not."""

import contextlib
import io
import os
import random
import shutil
import stat
import tempfile
import unittest

import storefake
import tarsnap
from tarsnap import BLOCKDEV, CHARDEV, DIRECTORY, FIFO, KIB, SYMLINK

ROOT = os.geteuid() == 0
S = 10 ** 9


def acl(*entries):
    """A POSIX ACL as Linux stores it: (tag, permissions, id)."""
    return (2).to_bytes(4, 'little') + b''.join(
        tag.to_bytes(2, 'little') + perm.to_bytes(2, 'little')
        + number.to_bytes(4, 'little') for tag, perm, number in entries)


ACL = acl((1, 6, 2 ** 32 - 1), (2, 4, 12345), (4, 4, 2 ** 32 - 1),
          (16, 4, 2 ** 32 - 1), (32, 0, 2 ** 32 - 1))


class ExtractCase(unittest.TestCase):

    def setUp(self):
        self.target = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.target)
        self.store = storefake.Store()
        self.builder = storefake.Builder(self.store)
        self.complete = True

    def add(self, *args, **fields):
        self.builder.add(*args, **fields)
        return self

    def extract(self, ordered=None, mangle=None, **given):
        """(errors, stderr); the archive is finished the first time."""
        if self.builder.waiting or self.builder.pages:
            self.record = self.builder.finish(self.complete, ordered)
            self.builder.waiting, self.builder.pages = [], []
        self.remote = storefake.FakeRemote(self.store, mangle)
        given.setdefault('directories', [os.fsencode(self.target)])
        with contextlib.redirect_stderr(io.StringIO()) as err:
            errors = tarsnap.mode_extract(self.remote,
                                          storefake.options(**given))
        return errors, err.getvalue()

    def path(self, name):
        return os.path.join(os.fsencode(self.target), os.fsencode(name))

    def stat(self, name):
        return os.lstat(self.path(name))

    def mode(self, name):
        return stat.S_IMODE(self.stat(name).st_mode)

    def read(self, name):
        with open(self.path(name), 'rb') as file:
            return file.read()

    def write(self, name, data, mtime=None):
        with open(self.path(name), 'wb') as file:
            file.write(data)
        if mtime is not None:
            os.utime(self.path(name), ns=(mtime, mtime))

    def names(self):
        found = []
        top = os.fsencode(self.target)
        for directory, below, files in os.walk(top):
            found += [os.path.relpath(os.path.join(directory, name), top)
                      for name in below + files]
        return sorted(found)


class ContentTest(ExtractCase):

    def test_every_size(self):
        rng = random.Random(11)
        sizes = (0, 1, 511, 512, 4095, 65535, 65536, 65537, 262144, 262145,
                 1000000)
        data = {b'f%07d' % size: rng.randbytes(size) for size in sizes}
        self.builder.small = 5000
        for name in data:
            self.add(name, data=data[name])
        self.assertEqual(self.extract(), (0, ''))
        for name in data:
            self.assertEqual(self.read(name), data[name])

    def test_a_file_in_many_lists(self):
        rng = random.Random(12)
        parts = [rng.randbytes(rng.randrange(1, 3000)) for _ in range(500)]
        self.add(b'f', parts=parts).add(b'g', data=b'after')
        self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(self.read('f'), b''.join(parts))
        self.assertEqual(self.read('g'), b'after')

    def test_holes_stay_holes(self):
        big = 64 * 1024 * KIB
        self.add(b'a', parts=[big, b'x' * 4096, big])
        self.add(b'b', parts=[b'y', big]).add(b'c', parts=[big])
        self.assertEqual(self.extract(), (0, ''))
        for name in 'abc':
            self.assertLess(self.stat(name).st_blocks * 512, 100 * KIB)
        self.assertEqual(self.stat('a').st_size, 2 * big + 4096)
        with open(self.path('a'), 'rb') as file:
            file.seek(big - 1)
            self.assertEqual(file.read(4098), b'\0' + b'x' * 4096 + b'\0')
        self.assertEqual(self.stat('b').st_size, 1 + big)
        self.assertEqual(self.stat('c').st_size, big)

    def test_repeats(self):
        self.add(b'a', parts=[b'1', (b'abc' * 100, 1000), b'2'])
        self.add(b'b', parts=[(b'xyz', 5)])
        self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(self.read('a'), b'1' + b'abc' * 100000 + b'2')
        self.assertEqual(self.read('b'), b'xyz' * 5)

    def test_S_makes_holes_of_zeros(self):
        data = bytes(1 << 20) + b'x' + bytes(1 << 20)
        self.add(b'a', data=data).add(b'b', parts=[(bytes(65536), 16)])
        self.add(b'c', data=b'x' * 10)
        self.assertEqual(self.extract(), (0, ''))
        self.assertGreater(self.stat('a').st_blocks * 512, 1 << 20)
        self.assertEqual(self.extract(sparse_out=True), (0, ''))
        self.assertLess(self.stat('a').st_blocks * 512, 100 * KIB)
        self.assertLess(self.stat('b').st_blocks * 512, 100 * KIB)
        self.assertEqual(self.read('a'), data)
        self.assertEqual(self.read('b'), bytes(1 << 20))
        self.assertEqual(self.read('c'), b'x' * 10)

    def test_O_writes_contents_to_stdout(self):
        self.add(b'a', data=b'one').add(b'd', DIRECTORY)
        self.add(b'd/b', parts=[b'two', 5, (b'x', 3)])
        self.add(b'l', SYMLINK, target=b'a').add(b'z', data=b'not wanted')
        reader, writer = os.pipe()
        saved = os.dup(1)
        os.dup2(writer, 1)
        try:
            result = self.extract(to_stdout=True, operands=[b'a', b'd'])
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            os.close(writer)
        with open(reader, 'rb') as file:
            self.assertEqual(file.read(), b'onetwo\0\0\0\0\0xxx')
        self.assertEqual(result, (0, ''))
        self.assertEqual(self.names(), [])


class MetadataTest(ExtractCase):

    def test_times_to_the_nanosecond(self):
        for name, kind, mtime in (
                (b'a', tarsnap.FILE, 1234567890123456789),
                (b'b', DIRECTORY, 987654321 * S + 1),
                (b'c', SYMLINK, 5 * S + 999999999), (b'd', FIFO, 7),
                (b'e', tarsnap.FILE, -3 * S + 5)):
            self.add(name, kind, mtime=mtime, atime=4 * S + 3,
                     target=b't' if kind == SYMLINK else b'')
        self.add(b'f', data=b'x', mtime=1)
        self.assertEqual(self.extract(), (0, ''))
        for name, mtime in ((b'a', 1234567890123456789), (b'f', 1),
                            (b'b', 987654321 * S + 1),
                            (b'c', 5 * S + 999999999), (b'd', 7),
                            (b'e', -3 * S + 5)):
            status = self.stat(name)
            self.assertEqual(status.st_mtime_ns, mtime, name)
            if name not in (b'f',):
                self.assertEqual(status.st_atime_ns, 4 * S + 3, name)
        self.assertGreater(self.stat('f').st_atime, 10 ** 9)

    def test_m_leaves_the_present(self):
        self.add(b'a', data=b'1', mtime=1).add(b'd', DIRECTORY, mtime=1)
        self.extract(no_mtime=True)
        self.assertGreater(self.stat('a').st_mtime, 10 ** 9)
        self.assertGreater(self.stat('d').st_mtime, 10 ** 9)

    def test_a_time_nobody_has(self):
        self.add(b'a', data=b'1', mtime=2 ** 62 * S).add(b'b', data=b'2')
        self.add(b'c', data=b'3', mtime=-2 ** 62 * S)
        errors, text = self.extract()       # some systems bend it, some do not
        self.assertEqual(errors, text.count('\n'))
        self.assertEqual(self.read('b'), b'2')

    def test_modes_under_any_umask(self):
        modes = (0, 0o7, 0o70, 0o444, 0o600, 0o640, 0o666, 0o755, 0o777,
                 0o1777)
        for mode in modes:
            self.add(b'f%04o' % mode, data=b'x', mode=mode)
            self.add(b'g%04o' % mode, FIFO, mode=mode & 0o777)
            self.add(b'h%04o' % mode, DIRECTORY, mode=mode)
            self.add(b'h%04o/x' % mode, data=b'x')
        for mask in (0, 0o22, 0o77, 0o177):
            old = os.umask(mask)
            try:
                self.assertEqual(self.extract(perms=True), (0, ''))
                self.assertEqual(os.umask(mask), mask)
            finally:
                os.umask(old)
            for mode in modes:
                self.assertEqual(self.mode('f%04o' % mode), mode)
                self.assertEqual(self.mode('g%04o' % mode), mode & 0o777)
                self.assertEqual(self.mode('h%04o' % mode), mode)

    def test_directories_keep_their_times_though_filled(self):
        for ordered in (True, False):
            self.setUp()
            self.add(b'a', DIRECTORY, mtime=1 * S, mode=0o500)
            self.add(b'a/b', DIRECTORY, mtime=2 * S, mode=0o510)
            self.add(b'a/b/c', data=b'x').add(b'a/d', data=b'x')
            self.add(b'e', DIRECTORY, mtime=3 * S)
            self.assertEqual(self.extract(ordered=ordered), (0, ''))
            self.assertEqual([self.stat(name).st_mtime_ns // S
                              for name in ('a', 'a/b', 'e')], [1, 2, 3])
            self.assertEqual([self.mode(name) for name in ('a', 'a/b')],
                             [0o500, 0o510])

    def test_directories_after_their_contents(self):
        self.add(b'a/b/c', data=b'x').add(b'a/b', DIRECTORY, mtime=2 * S)
        self.add(b'a', DIRECTORY, mtime=1 * S).add(b'a/b/d', data=b'y')
        self.assertEqual(self.extract(ordered=False), (0, ''))
        self.assertEqual(self.stat('a').st_mtime_ns, S)
        self.assertEqual(self.stat('a/b').st_mtime_ns, 2 * S)

    def test_directories_get_their_times_when_entries_fail(self):
        self.add(b'd', DIRECTORY, mtime=5 * S, mode=0o711)
        self.add(b'd/' + b'x' * 300, data=b'x')
        errors, _ = self.extract()
        self.assertEqual(errors, 1)
        self.assertEqual((self.stat('d').st_mtime_ns, self.mode('d')),
                         (5 * S, 0o711))

    def test_attributes(self):
        try:
            os.setxattr(self.target, b'user.test', b'1')
        except OSError:
            self.skipTest('no user attributes here')
        big = b'v' * 5000
        try:
            os.setxattr(self.target, b'user.big', big)
        except OSError:
            big = b'v' * 1000
        values = ((b'user.a', b'1'), (b'user.b\xff', b'\0\xff\n'),
                  (b'user.empty', b''), (b'user.big', big))
        self.add(b'd', DIRECTORY, xattrs=values)
        self.add(b'f', data=b'1', xattrs=values, mode=0o400, mtime=9)
        self.assertEqual(self.extract(perms=True), (0, ''))
        for name in 'df':
            for attribute, value in values:
                self.assertEqual(os.getxattr(self.path(name), attribute),
                                 value)
        self.assertEqual(self.stat('f').st_mtime_ns, 9)
        self.assertEqual(self.extract(perms=False), (0, ''))
        self.assertEqual(os.listxattr(self.path('f')), [])

    def test_acls(self):
        try:
            os.setxattr(self.target, b'system.posix_acl_access', ACL)
            os.removexattr(self.target, b'system.posix_acl_access')
        except OSError:
            self.skipTest('no ACLs here')
        self.add(b'd', DIRECTORY, mode=0o640, xattrs=(
            (b'system.posix_acl_access', ACL),
            (b'system.posix_acl_default', ACL)))
        self.add(b'd/sub', DIRECTORY).add(b'd/x', data=b'1', mode=0o666)
        self.add(b'd/y', data=b'1', mode=0o644)
        self.add(b'f', data=b'1', mode=0o640,
                 xattrs=((b'system.posix_acl_access', ACL),))
        self.assertEqual(self.extract(perms=True), (0, ''))
        for name, kinds in (('d', ('access', 'default')),
                            ('f', ('access',))):
            self.assertEqual(self.mode(name), 0o640)
            for kind in kinds:
                self.assertEqual(os.getxattr(
                    self.path(name), 'system.posix_acl_' + kind), ACL)
        self.assertEqual(self.mode('d/x'), 0o666)
        # A second time into directories that now pass ACLs on.
        self.assertEqual(self.extract(perms=True), (0, ''))
        self.assertEqual([self.mode(name) for name in ('d/x', 'd/y',
                                                       'd/sub')],
                         [0o666, 0o644, 0o755])

    @unittest.skipUnless(ROOT, 'needs root')
    def test_owners(self):
        self.add(b'a', data=b'1', uid=1234, gid=2345)
        self.add(b'b', data=b'1', uid=1234, uname=b'daemon', gname=b'daemon')
        self.add(b'c', SYMLINK, target=b'x', uid=1234, gid=2345)
        self.add(b'd', DIRECTORY, uid=1234, gid=2345)
        self.add(b'e', FIFO, uid=1234, gid=2345)
        self.add(b'f', data=b'1', uid=77, uname=b'no such user')
        self.add(b'g', data=b'1')
        self.assertEqual(self.extract(), (0, ''))
        owner = {name: (self.stat(name).st_uid, self.stat(name).st_gid)
                 for name in 'abcdefg'}
        for name in 'acde':
            self.assertEqual(owner[name], (1234, 2345))
        self.assertEqual((owner['b'], owner['f'][0], owner['g']),
                         ((1, 1), 77, (0, 0)))
        self.extract(numeric_owner=True)
        self.assertEqual(self.stat('b').st_uid, 1234)
        self.extract(own=False)
        for name in 'abcefg':
            self.assertEqual(self.stat(name).st_uid, 0)

    @unittest.skipUnless(ROOT, 'needs root')
    def test_devices(self):
        self.add(b'c', CHARDEV, device=(1, 3), mode=0o666)
        self.add(b'b', BLOCKDEV, device=(300, 70000), mode=0o640)
        errors, text = self.extract()
        if 'not permitted' in text:
            self.skipTest('cannot make devices here')
        self.assertEqual((errors, text), (0, ''))
        status = self.stat('c')
        self.assertTrue(stat.S_ISCHR(status.st_mode))
        self.assertEqual(status.st_rdev, os.makedev(1, 3))
        self.assertEqual(self.mode('c'), 0o666)
        self.assertEqual(self.stat('b').st_rdev, os.makedev(300, 70000))


class NamesTest(ExtractCase):

    def test_any_bytes(self):
        names = [b'\xff\xfe', b'new\nline', '\u00e9'.encode(), b' ', b'-x',
                 b'\\', b'*', b'a' * 255, b'\x01']
        for name in sorted(names):
            self.add(name, data=name)
        self.add(b'zz', SYMLINK, target=b'\xff\n')
        self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(self.names(), sorted(names + [b'zz']))
        for name in names:
            self.assertEqual(self.read(name), name)
        self.assertEqual(os.readlink(self.path('zz')), b'\xff\n')

    def test_strip_components_and_rename(self):
        self.add(b'a/b/c', data=b'1').add(b'a/d', data=b'2')
        self.assertEqual(self.extract(strip_components=2), (0, ''))
        self.assertEqual(self.names(), [b'c'])
        self.extract(rename=lambda path: path.replace(b'a/', b'')
                     if b'd' in path else b'')
        self.assertEqual(self.names(), [b'c', b'd'])

    def test_hard_links_are_one_file(self):
        link = {'data': b'same', 'link': (9, 0), 'mtime': 7 * S}
        self.add(b'a', **link).add(b'd', DIRECTORY, mode=0o755, mtime=S)
        self.add(b'd/b', **link).add(b'e', data=b'x').add(b'f', **link)
        self.add(b's', SYMLINK, target=b'a', link=(10, 0))
        self.add(b't', SYMLINK, target=b'a', link=(10, 0))
        for _ in range(2):                  # the second time over the first
            self.assertEqual(self.extract(), (0, ''))
            self.assertEqual(self.stat('a').st_nlink, 3)
            for name in ('d/b', 'f'):
                self.assertEqual(self.stat(name).st_ino,
                                 self.stat('a').st_ino)
            self.assertEqual(self.read('f'), b'same')
            self.assertEqual(self.stat('f').st_mtime_ns, 7 * S)
            self.assertEqual(self.stat('d').st_mtime_ns, S)
            self.assertEqual(self.stat('s').st_ino, self.stat('t').st_ino)

    def test_a_second_name_alone_is_a_whole_file(self):
        big = random.Random(1).randbytes(200000)
        self.add(b'a', data=big, link=(9, 0)).add(b'b', data=big,
                                                  link=(9, 0))
        self.assertEqual(self.extract(operands=[b'b']), (0, ''))
        self.assertEqual(self.names(), [b'b'])
        self.assertEqual(self.read('b'), big)

    def test_a_second_name_when_the_first_cannot_be_linked(self):
        big = random.Random(1).randbytes(200000)
        self.add(b'a', data=big, link=(9, 0))
        self.add(b'a', data=b'other')
        self.add(b'b', data=big, link=(9, 0))
        self.assertEqual(self.extract(ordered=False), (0, ''))
        self.assertEqual(self.read('b'), big)
        self.assertEqual(self.read('a'), b'other')

    def test_what_is_in_the_way_is_replaced(self):
        for name in ('dir', 'full'):
            os.mkdir(self.path(name))
        self.write('full/x', b'')
        self.write('file', b'old')
        self.add(b'dir', data=b'1').add(b'file', DIRECTORY)
        self.add(b'file/x', data=b'2').add(b'full', data=b'3')
        errors, text = self.extract()
        self.assertEqual((errors, text), (1, 'full: Directory not empty\n'))
        self.assertEqual(self.read('dir'), b'1')
        self.assertEqual(self.read('file/x'), b'2')

    def test_a_file_where_a_directory_must_be(self):
        self.write('f', b'old')
        self.add(b'f/x', data=b'1')
        self.assertEqual(self.extract(), (1, 'f/x: Not a directory\n'))
        self.assertEqual(self.read('f'), b'old')


class KeepTest(ExtractCase):

    def test_k_never_replaces(self):
        self.write('a', b'old')
        self.add(b'a', data=b'new').add(b'b', data=b'new')
        self.assertEqual(self.extract(keep_old=True),
                         (1, 'a: File exists\n'))
        self.assertEqual((self.read('a'), self.read('b')), (b'old', b'new'))

    def test_newer_files_are_kept_silently(self):
        self.add(b'a', data=b'new', mtime=100 * S)
        self.add(b'b', data=b'new', mtime=100 * S)
        self.write('a', b'disk', 101 * S)
        self.write('b', b'disk', 99 * S)
        self.assertEqual(self.extract(keep_newer=True), (0, ''))
        self.assertEqual((self.read('a'), self.read('b')), (b'disk', b'new'))

    def test_resume_skips_what_is_there_and_fetches_none_of_it(self):
        for number in range(20):
            self.add(b'f%02d' % number, data=b'%02d' % number * 1000,
                     mtime=100 * S + 5)
        self.assertEqual(self.extract(), (0, ''))
        whole = self.remote.sent
        self.write('f03', b'03' * 999 + b'xx', 100 * S)
        self.write('f04', b'longer' * 1000, 100 * S)
        self.write('f05', b'05' * 999 + b'xx', 101 * S)
        self.assertEqual(self.extract(resume_extract=True), (0, ''))
        self.assertEqual(self.remote.sent, whole - 20 + 2)
        self.assertEqual(self.read('f03'), b'03' * 999 + b'xx')
        self.assertEqual(self.read('f04'), b'04' * 1000)
        self.assertEqual(self.read('f05'), b'05' * 1000)


class PickTest(ExtractCase):

    def fill(self):
        self.builder.per_page = 2
        self.add(b'a', DIRECTORY)
        for number in range(10):
            self.add(b'a/%d' % number, data=b'%d' % number)
        self.add(b'b', DIRECTORY).add(b'b/x', data=b'x').add(b'c', data=b'c')

    def test_operands_and_excludes(self):
        self.fill()
        self.assertEqual(self.extract(operands=[b'a/[23]', b'b'],
                                      exclude=[b'3']), (0, ''))
        self.assertEqual(self.names(), [b'a', b'a/2', b'b', b'b/x'])

    def test_operand_not_found(self):
        self.fill()
        self.assertEqual(self.extract(operands=[b'nix', b'c', b'x*']), (
            2, 'tarsnap: nix: Not found in archive\n'
            'tarsnap: x*: Not found in archive\n'))
        self.assertEqual(self.names(), [b'c'])

    def test_q_stops_when_all_are_met(self):
        self.builder.per_page = 1
        for number in range(300):
            self.add(b'd%03d' % number, DIRECTORY)
            self.add(b'd%03d/f' % number, data=b'%d' % number)
        self.assertEqual(self.extract(operands=[b'd000*', b'd002'],
                                      fast_read=True), (0, ''))
        self.assertEqual(self.names(), [b'd000', b'd000/f', b'd002',
                                        b'd002/f'])
        self.assertLess(self.remote.sent, 500)

    def test_one_file_fetches_little(self):
        self.fill()
        for number in range(1000):
            self.add(b'd/%04d' % number, data=b'%d' % number)
        self.extract(operands=[b'd/0777'])
        self.assertEqual(self.read('d/0777'), b'777')
        self.assertLess(self.remote.sent, 25)

    def test_verbose_lines(self):
        self.add(b'a', DIRECTORY).add(b'a/f', data=b'1')
        self.add(b'b/../c', data=b'1')
        self.assertEqual(self.extract(verbose=1), (
            1, "x a/\nx a/f\nx b/../c: Path contains '..'\n"))


class DamageTest(ExtractCase):

    def lose(self, data):
        """A mangle that loses the chunk of `data`."""
        lost = self.store.names.chunk(data)
        return lambda name, block: None if name == lost else block

    def test_a_lost_chunk_harms_its_file_only(self):
        self.write('b', b'still here')
        for name in (b'a', b'b', b'c'):
            self.add(name, data=name * 100)
        errors, text = self.extract(mangle=self.lose(b'b' * 100))
        self.assertEqual(errors, 1)
        self.assertRegex(text, '^b: block [0-9a-f]{16} is missing')
        self.assertEqual(self.read('a'), b'a' * 100)
        self.assertEqual(self.read('b'), b'still here')
        self.assertEqual(self.read('c'), b'c' * 100)

    def test_the_rest_of_a_large_file_is_saved(self):
        parts = [bytes([number]) * 5000 for number in range(1, 100)]
        self.add(b'f', parts=parts, mtime=5).add(b'g', data=b'1')
        errors, text = self.extract(mangle=self.lose(parts[50]))
        self.assertEqual(errors, 1)
        self.assertIn('zeros stand in its place', text)
        parts[50] = bytes(5000)
        self.assertEqual(self.read('f'), b''.join(parts))
        self.assertNotEqual(self.stat('f').st_mtime_ns, 5)
        self.assertEqual(self.read('g'), b'1')

    def test_a_lost_list_harms_its_file_only(self):
        self.add(b'f', parts=[bytes([number]) for number in range(200)])
        self.add(b'g', data=b'1')
        self.builder.page_end()
        page = self.store.blocks[self.builder.pages[0][0].name]
        refs = tarsnap.Opener(self.store.key).open(
            tarsnap.INDEX, self.builder.pages[0][0].name, page)[0]
        block = tarsnap.index_unpack(refs, bytes(32))
        lists = [kid.name for kid in block.kids
                 if kid.cls == tarsnap.INDEX]
        errors, text = self.extract(
            mangle=lambda name, whole: None if name == lists[-1] else whole)
        self.assertEqual(errors, 1)
        self.assertTrue(text.startswith('f: block'), text)
        self.assertEqual(self.read('g'), b'1')

    def test_truncated_archive(self):
        self.complete = False
        self.add(b'a', data=b'1')
        errors, text = self.extract()
        self.assertEqual(errors, 1)
        lines = text.splitlines()
        self.assertEqual(lines[0], 'tarsnap: Truncated input file')
        self.assertEqual(len(lines), 2)
        self.assertEqual(self.read('a'), b'1')

    def test_failing_before_the_data_of_a_large_file_skips_its_data(self):
        parts = [bytes([number]) * 200000 for number in range(1, 100)]
        self.add(b'../f', parts=parts).add(b'g', data=b'1')
        errors, _ = self.extract()
        self.assertEqual(errors, 1)
        self.assertLess(self.remote.sent, 70)
        self.assertEqual(self.read('g'), b'1')


class PlaceTest(ExtractCase):

    def test_C_chains(self):
        os.makedirs(self.path('one/two'))
        self.add(b'f', data=b'1')
        before = os.getcwd()
        self.assertEqual(self.extract(directories=[
            os.fsencode(self.target), b'one', b'two']), (0, ''))
        self.assertEqual(self.read('one/two/f'), b'1')
        self.assertEqual(os.getcwd(), before)
        with self.assertRaisesRegex(tarsnap.UserError, 'nowhere'):
            self.extract(directories=[b'nowhere'])

    def test_missing_parents_have_usual_modes(self):
        old = os.umask(0o027)
        try:
            self.add(b'a/b/f', data=b'1', mode=0o604)
            self.assertEqual(self.extract(perms=True), (0, ''))
        finally:
            os.umask(old)
        self.assertEqual((self.mode('a'), self.mode('a/b'),
                          self.mode('a/b/f')), (0o750, 0o750, 0o604))


if __name__ == '__main__':
    unittest.main()
