# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Nothing is left out of an archive in silence.

What an unchanged run takes over from the last one is where a backup program
loses files while it says that all is well.  Each rule against that is shown
twice: with it the archive holds what the tree holds, and (where it can be
taken away in one line) without it the loss is there to see.
"""

import contextlib
import os
import random
import re
import shutil
import stat
import subprocess
import unittest
from unittest import mock

import lab
import tarsnap
from lab import ROOT, LabTest, fine, snapshot

SEED = int(os.environ.get('SEED', random.SystemRandom().randrange(10 ** 6)))
RUNS = 25


def setUpModule():
    print('SEED=%d' % SEED)


def reads():
    """Count the files whose content is read."""
    return mock.patch.object(tarsnap.FileReader, 'read', autospec=True,
                             side_effect=tarsnap.FileReader.read)


class HardLinks(LabTest):
    """Every name carries its own content; no row names another path."""

    def setUp(self):
        super().setUp()
        # Two directories in pages of their own.
        def page_ends(writer, member):
            return member.endswith(b'/z')
        patch = mock.patch.object(tarsnap.Writer, 'page_ends', page_ends)
        patch.start()
        self.addCleanup(patch.stop)
        for name in 'ab':
            self.write(name + '/z')
        self.write('a/f', b'linked' * 1000)
        os.link(os.path.join(self.lab.tree, 'a/f'),
                os.path.join(self.lab.tree, 'b/f'))

    def test_first_name_moved_away(self):
        self.store('one', 'a', 'b')
        os.rename(os.path.join(self.lab.tree, 'a'),
                  os.path.join(self.lab.tree, 'c'))
        with reads() as read:
            self.host.create('two', 'b')
        self.assertEqual(read.call_count, 0, 'the page of b was not reused')
        target = self.host.extract('two')
        with open(os.path.join(target, 'b/f'), 'rb') as file:
            self.assertEqual(file.read(), b'linked' * 1000)
        self.store('three', 'b', 'c')

    def test_first_name_excluded(self):
        self.store('one', 'a', 'b')
        for number, args in enumerate((('--exclude', 'a/*'),
                                       ('--exclude', 'a'))):
            name = 'two%d' % number
            self.host.good('-c', '-f', name, *args, '-C', self.lab.tree,
                           'a', 'b')
            target = self.host.extract(name)
            with open(os.path.join(target, 'b/f'), 'rb') as file:
                self.assertEqual(file.read(), b'linked' * 1000)

    def test_one_name_alone(self):
        self.host.create('one', 'b')
        target = self.host.extract('one')
        with open(os.path.join(target, 'b/f'), 'rb') as file:
            self.assertEqual(file.read(), b'linked' * 1000)

    def test_extract_the_second_name(self):
        self.host.create('one', 'a', 'b')
        target = self.host.extract('one', 'b/f')
        self.assertEqual(sorted(snapshot(target)), [b'', b'b', b'b/f'])
        with open(os.path.join(target, 'b/f'), 'rb') as file:
            self.assertEqual(file.read(), b'linked' * 1000)

    def test_names_share_an_inode_again(self):
        self.host.create('one', 'a', 'b')
        target = self.host.extract('one')
        self.assertEqual(os.stat(os.path.join(target, 'a/f')).st_ino,
                         os.stat(os.path.join(target, 'b/f')).st_ino)

    def test_large_file_once(self):
        data = random.Random(SEED).randbytes(300000)
        path = self.write('a/g', data)
        os.link(path, os.path.join(self.lab.tree, 'b/g'))
        with lab.tapped() as log:
            self.store('one', 'a', 'b')
        chunks = log.puts(b'c')
        self.assertLess(sum(row[2] for row in chunks), 330000)


class Unreadable(LabTest):
    """An entry that could not be read is tried, and reported, every time."""

    def open_fails(self, *names):
        """The client's os.open refuses these; root could read anything."""
        real = os.open

        def fails(path, *args, **kwargs):
            if isinstance(path, bytes) and os.path.basename(path) in names \
                    and kwargs.get('dir_fd') is not None:
                raise PermissionError(13, 'Permission denied')
            return real(path, *args, **kwargs)
        return mock.patch.object(os, 'open', fails)

    def setUp(self):
        super().setUp()
        for name in ('a', 'b', 'secret', 'x'):
            self.write('d/' + name, name.encode() * 100)

    def without(self, *names):
        rows = snapshot(self.lab.tree)
        for name in names:
            del rows[name]
        return rows

    def test_unreadable_then_readable(self):
        with self.open_fails(b'secret'):
            result = self.host.create('one', status=2)
        self.assertIn('d/secret: Cannot read', result.err)
        self.host.check('one', self.without(b'd/secret'))
        self.store('two')

    def test_as_if_it_had_been_read_it_is_lost(self):
        """The same with the rule taken away: lost, and exit status 0."""
        real = tarsnap.Writer.read

        def read(writer, folder, name, member, st, key):
            try:
                real(writer, folder, name, member, st, key)
            except OSError as e:
                entry = tarsnap.Entry()
                writer.fill(entry, st)
                entry.path = member
                writer.page_add(entry, tarsnap.Content(), [], key)
                writer.report(str(e))

        with self.open_fails(b'secret'), mock.patch.object(
                tarsnap.Writer, 'read', read):
            self.host.create('one', status=2)
        self.host.create('two')
        found = snapshot(self.host.extract('two'))
        self.assertEqual(found[b'd/secret']['content'][0], 0)

    def test_readable_then_unreadable(self):
        """Nothing changed, so the row is still good: no need to read."""
        self.store('one')
        with self.open_fails(b'secret'):
            self.host.create('two')
        self.host.check('two', snapshot(self.lab.tree))
        self.write('d/secret', b'changed')
        for name in ('three', 'four', 'five'):
            with self.open_fails(b'secret'):
                result = self.host.create(name, status=2)
            self.assertIn('d/secret: Cannot read', result.err)
            self.host.check(name, self.without(b'd/secret'))
        self.store('six')

    def test_reported_on_every_run(self):
        for name in ('one', 'two', 'three'):
            with self.open_fails(b'secret'):
                result = self.host.create(name, status=2)
            self.assertIn('d/secret: Cannot read', result.err)

    def test_reported_also_first_and_last_of_a_page(self):
        for victim in (b'a', b'x', b'd'):
            with self.subTest(victim=victim), fine():
                path = os.path.join(self.lab.tree, 'd', os.fsdecode(victim))
                if victim != b'd':
                    os.utime(path, ns=(1, 1))
                for turn in range(2):
                    with self.open_fails(victim):
                        result = self.host.create(
                            '%s-%d' % (victim.decode(), turn), status=2)
                    self.assertIn('Cannot read', result.err)
                self.store(victim.decode())

    @unittest.skipIf(not ROOT, 'needs root to become somebody else')
    def test_real_permissions(self):
        self.host.create('imports everything')
        self.host.lose('cache')
        for top, _, files in os.walk(self.lab.root):
            os.chown(top, 65534, 65534)
            for name in files:
                os.lchown(os.path.join(top, name), 65534, 65534)
        os.chmod(os.path.join(self.lab.tree, 'd/secret'), 0)
        for turn in range(2):
            os.seteuid(65534)
            try:
                result = self.host.run('-c', '-f', 'run%d' % turn, '-C',
                                       self.lab.tree, 'd')
            finally:
                os.seteuid(0)
            self.assertEqual(result.status, 2, result)
            self.assertIn('d/secret: Cannot read: Permission denied',
                          result.err)

    def test_read_error_in_the_middle(self):
        """EIO from read: the file is reported, each time, the rest kept."""
        self.write('d/big', bytes(range(256)) * 400)
        real = os.pread

        def fails(fd, size, pos):
            if os.readlink('/proc/self/fd/%d' % fd).endswith('d/big'):
                raise OSError(5, 'Input/output error')
            return real(fd, size, pos)

        if not os.path.exists('/proc/self/fd'):
            self.skipTest('no /proc')
        for name in ('one', 'two'):
            with mock.patch.object(os, 'pread', fails):
                result = self.host.create(name, status=2)
            self.assertIn('d/big: Cannot read: Input/output error',
                          result.err)
            self.host.check(name, self.without(b'd/big'))
        self.store('three')

    def test_directory_that_cannot_be_read(self):
        real = os.listdir

        def fails(path='.'):
            if isinstance(path, int) and os.fstat(path).st_ino == inode:
                raise PermissionError(13, 'Permission denied')
            return real(path)

        inode = os.stat(os.path.join(self.lab.tree, 'd')).st_ino
        for name in ('one', 'two'):
            with mock.patch.object(os, 'listdir', fails):
                result = self.host.create(name, status=2)
            self.assertIn('d: Cannot read directory', result.err)
        self.store('three')
        with mock.patch.object(os, 'listdir', fails):
            self.host.create('four', status=2)
        self.store('five')

    def test_directory_cut_short(self):
        """An error in the middle of a directory is no end of it."""
        real = os.listdir

        def fails(path='.'):
            if isinstance(path, int):
                raise OSError(5, 'Input/output error')
            return real(path)

        with mock.patch.object(os, 'listdir', fails):
            result = self.host.create('one', status=2)
        self.assertIn('Cannot read directory: Input/output error',
                      result.err)

    def test_lstat_that_fails(self):
        real = os.stat

        def fails(path, *args, **kwargs):
            if path == b'secret':
                raise OSError(5, 'Input/output error')
            return real(path, *args, **kwargs)

        for name in ('one', 'two'):
            with mock.patch.object(os, 'stat', fails):
                result = self.host.create(name, status=2)
            self.assertIn('d/secret: Cannot stat', result.err)
        self.store('three')

    @unittest.skipIf(not hasattr(os, 'setxattr'), 'no extended attributes')
    def test_attributes_that_cannot_be_read(self):
        path = os.path.join(self.lab.tree, 'd/a')
        try:
            os.setxattr(path, 'user.note', b'keep me')
        except OSError:
            self.skipTest('no extended attributes on this file system')
        for call, number in (('getxattr', 5), ('listxattr', 5),
                             ('getxattr', 13)):
            def fails(*args, **kwargs):
                raise OSError(number, os.strerror(number))
            for turn in range(2):
                with mock.patch.object(os, call, fails):
                    result = self.host.create(
                        '%s-%d-%d' % (call, number, turn), status=2)
                self.assertIn('d/a: Cannot read', result.err)
            self.store('%s-%d' % (call, number))
            os.utime(path, ns=(5, number))

    def test_vanished_between_stat_and_open(self):
        real, tree = os.open, self.lab.tree

        def vanish(path, *args, **kwargs):
            if path == b'secret':
                os.unlink(os.path.join(tree, 'd/secret'))
            return real(path, *args, **kwargs)

        with mock.patch.object(os, 'open', vanish):
            result = self.host.create('one', status=2)
        self.assertIn('d/secret: Cannot read', result.err)
        self.write('d/secret', b'back')
        self.store('two')

    def test_symbolic_link_vanished(self):
        os.symlink('b', os.path.join(self.lab.tree, 'd/link'))
        real, tree = os.readlink, self.lab.tree

        def vanish(path, *args, **kwargs):
            if path == b'link':
                os.unlink(os.path.join(tree, 'd/link'))
            return real(path, *args, **kwargs)

        with mock.patch.object(os, 'readlink', vanish):
            result = self.host.create('one', status=2)
        self.assertIn('d/link: Cannot read', result.err)
        self.store('two')


class Replaced(LabTest):
    """What an entry becomes between two calls is never followed."""

    def setUp(self):
        super().setUp()
        self.write('d/inside', b'inside')
        self.write('e', b'e')
        os.mkdir(self.lab.path('outside'))
        with open(self.lab.path('outside', 'passwd'), 'wb') as file:
            file.write(b'outside')

    def replace(self, name, make):
        """When `name` is opened, it has been replaced by what make() does."""
        real, done = os.open, []

        def opens(path, *args, **kwargs):
            if path == name and not done:
                done.append(path)
                full = os.path.join(self.lab.tree, os.fsdecode(name))
                os.rename(full, self.lab.path('moved'))
                make(full)
            return real(path, *args, **kwargs)
        return mock.patch.object(os, 'open', opens)

    def outside(self, full):
        os.symlink(self.lab.path('outside'), full)

    def test_directory_becomes_symbolic_link(self):
        with self.replace(b'd', self.outside):
            result = self.host.create('one', status=2)
        self.assertIn('d: Cannot read directory', result.err)
        found = snapshot(self.host.extract('one'))
        self.assertEqual(sorted(found), [b'', b'd', b'e'])
        self.store('two')

    def test_operand_becomes_symbolic_link(self):
        with self.replace(b'd', self.outside):
            result = self.host.create('one', 'd', 'e', status=2)
        self.assertIn('d: Cannot read directory', result.err)
        self.assertEqual(sorted(snapshot(self.host.extract('one'))),
                         [b'', b'd', b'e'])

    def test_file_becomes_symbolic_link(self):
        with self.replace(b'e', lambda full: os.symlink(
                self.lab.path('outside', 'passwd'), full)):
            result = self.host.create('one', status=2)
        self.assertIn('e: Cannot read', result.err)
        self.assertNotIn(b'e', snapshot(self.host.extract('one')))
        self.store('two')

    def test_file_becomes_fifo(self):
        """Which must not hang, either."""
        with self.replace(b'e', os.mkfifo):
            result = self.host.create('one', status=2)
        self.assertIn('e: Cannot read: Changed into something else',
                      result.err)
        self.store('two')

    def test_file_becomes_directory(self):
        with self.replace(b'e', os.mkdir):
            self.host.create('one', status=2)
        self.store('two')


class Fresh(LabTest):
    """A file so fresh that it could change unseen is always read again."""

    DATA = (b'before', b'after!')

    def rewrite(self, stamp):
        """The same size and the same times: what a coarse clock shows."""
        path = self.write('f', self.DATA[0])
        times, inode = os.stat(path), os.stat(path).st_ino

        def same(st):
            """`st` with the times the file had at first."""
            if st.st_ino != inode:
                return st
            fields = {name: getattr(times, name) for name in (
                'st_mtime_ns', 'st_ctime_ns')}
            return Stat(st, fields)

        with mock.patch.object(os, 'stat', wrap(os.stat, same)), \
                mock.patch.object(os, 'fstat', wrap(os.fstat, same)), \
                mock.patch.object(tarsnap, 'RACY', stamp):
            self.host.create('one')
            self.write('f', self.DATA[1])
            self.host.create('two')
        target = self.host.extract('two')
        with open(os.path.join(target, 'f'), 'rb') as file:
            return file.read()

    def test_same_size_same_times(self):
        self.assertEqual(self.rewrite(2 * tarsnap.BILLION), self.DATA[1])

    def test_without_the_rule_it_is_lost(self):
        self.assertEqual(self.rewrite(-10 ** 18), self.DATA[0])

    def test_two_seconds_and_more(self):
        """The rule is about the start of the run, in nanoseconds."""
        self.assertGreaterEqual(tarsnap.Writer.stat_key.__globals__[
            'BILLION'] * 2, 2 * 10 ** 9)
        writer = mock.Mock(key=mock.Mock(k_cut=bytes(32)), keyed=False)
        writer.opt.snaptime = writer.opt.disk_pause = None
        writer.owner.return_value = b'', b'', b''
        with mock.patch.object(tarsnap, 'RACY', 2 * tarsnap.BILLION), \
                mock.patch.object(tarsnap.time, 'time_ns', lambda: 10 ** 18):
            tarsnap.Writer.start_over(writer)
        base = os.lstat(self.write('f', b'1'))
        for age, never in ((0, True), (1999999999, True),
                           (2 * 10 ** 9, False), (-5, True)):
            for field in ('st_mtime_ns', 'st_ctime_ns'):
                times = {'st_mtime_ns': 1, 'st_ctime_ns': 1,
                         field: 10 ** 18 - age}
                key = tarsnap.Writer.stat_key(writer, b'f',
                                              Stat(base, times))
                self.assertEqual(key == b'', never, (age, field))


class Stat:
    """A stat result with some fields of one's own."""

    def __init__(self, st, fields):
        self.st, self.fields = st, fields

    def __getattr__(self, name):
        return self.fields[name] if name in self.fields else getattr(
            self.st, name)


def wrap(real, change):
    def call(*args, **kwargs):
        return change(real(*args, **kwargs))
    return call


class WhileRead(LabTest):
    """A file that changes while it is read is stored as it was read, and read
    again next time.
    """

    SIZES = (1000, 100000, 3000000)

    def during(self, path, action):
        """Do `action` once, after the first bytes of `path` were read."""
        inode, done = os.stat(path).st_ino, []

        def hook(real):
            def read(fd, *args):
                data = real(fd, *args)
                if not done and os.fstat(fd).st_ino == inode:
                    done.append(fd)
                    action(path)
                return data
            return read

        stack = contextlib.ExitStack()
        for name in ('read', 'pread'):
            stack.enter_context(mock.patch.object(
                os, name, hook(getattr(os, name))))
        return stack

    def run_one(self, size, action):
        path = self.write('f', random.Random(SEED).randbytes(size))
        self.host.create('base-%d' % self.lab.copies)
        os.utime(path, ns=(7, self.lab.copies))
        name = 'changing-%d' % self.lab.copies
        with self.during(path, action):
            result = self.host.create(name)
        found = snapshot(self.host.extract(name))
        self.assertLessEqual(found[b'f']['content'][0], size)
        self.store('after-%d' % self.lab.copies)
        return result

    def test_grows(self):
        def grow(path):
            with open(path, 'ab') as file:
                file.write(b'more' * 1000)
        for size in self.SIZES:
            result = self.run_one(size, grow)
            self.assertIn('f: file may have grown while being archived',
                          result.err)

    def test_shrinks(self):
        for size in self.SIZES:
            self.run_one(size, lambda path: os.truncate(path, 500))

    def test_emptied(self):
        for size in self.SIZES:
            self.run_one(size, lambda path: os.truncate(path, 0))

    def test_is_rewritten(self):
        def rewrite(path):
            size, times = os.stat(path).st_size, os.stat(path)
            with open(path, 'r+b') as file:
                file.write(b'\xee' * size)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        for size in self.SIZES:
            self.run_one(size, rewrite)

    def test_without_the_rule_it_is_lost(self):
        """The key of before the change is of no use, if that is kept."""
        path = self.write('f', b'1' * 1000)

        def rewrite(path):
            with open(path, 'r+b') as file:
                file.write(b'2' * 1000)

        def outcome(writer, member, key):
            return writer.stat_key(member, os.stat(path))

        with mock.patch.object(tarsnap, 'RACY', -10 ** 18):
            with self.during(path, rewrite), mock.patch.object(
                    tarsnap.Writer, 'read_outcome', outcome):
                self.host.create('one')
            self.host.create('two')
        target = self.host.extract('two')
        with open(os.path.join(target, 'f'), 'rb') as file:
            self.assertEqual(file.read(), b'1' * 1000)

    def test_hard_link_of_a_changing_file(self):
        """The second name must not take over what the first one was."""
        path = self.write('f', b'1' * 1000)
        os.link(path, os.path.join(self.lab.tree, 'g'))

        def rewrite(path):
            with open(path, 'r+b') as file:
                file.write(b'2' * 1000)

        with self.during(path, rewrite):
            self.host.create('one')
        target = self.host.extract('one')
        with open(os.path.join(target, 'g'), 'rb') as file:
            self.assertEqual(file.read(), b'2' * 1000)
        self.store('two')


class Digest(LabTest):
    """What makes a page be looked at again, and what must not."""

    def setUp(self):
        super().setUp()
        for name in ('a', 'b/c', 'b/d'):
            self.write(name, name.encode() * 50)

    def test_unchanged_reads_nothing(self):
        self.store('one')
        with reads() as read, lab.tapped() as log:
            self.store('two')
        self.assertEqual(read.call_count, 0)
        self.assertEqual(len(log.puts(b'c')) + len(log.puts(b'i')), 0)

    def test_owner_name_changes(self):
        self.store('one')
        real = tarsnap.owner_names
        with mock.patch.object(tarsnap, 'owner_names',
                               lambda uid, gid: (b'newname', b'newgroup')):
            self.host.create('two')
        listing = self.host.good('-t', '-v', '-f', 'two', cache=False).out
        self.assertEqual(listing.count('newname'), 5, listing)
        self.assertEqual(listing.count('newgroup'), 5, listing)
        self.assertIs(tarsnap.owner_names, real)
        self.host.create('three')
        self.assertNotIn('newname', self.host.good(
            '-t', '-v', '-f', 'three', cache=False).out)

    def atimes(self, name):
        """Paths whose access time archive `name` holds."""
        import tarfile
        target = self.lab.fresh('tar')
        with open(target, 'wb') as file:
            file.write(self.host.good('-r', '-f', name, cache=False)
                       .out.encode('utf-8', 'surrogateescape'))
        with tarfile.open(target) as tar:
            return {member.name: member.pax_headers['atime']
                    for member in tar if 'atime' in member.pax_headers}

    def test_store_atime(self):
        names = {'.', './a', './b', './b/c', './b/d'}
        self.host.create('without')
        self.assertEqual(self.atimes('without'), {})
        self.host.create('with', '--store-atime')
        self.assertEqual(set(self.atimes('with')), names)
        path = os.path.join(self.lab.tree, 'a')
        os.utime(path, ns=(12345 * 10 ** 9, os.stat(path).st_mtime_ns))
        self.host.create('again', '--store-atime')
        self.assertEqual(float(self.atimes('again')['./a']), 12345)
        self.host.create('without2')
        self.assertEqual(self.atimes('without2'), {})

    def test_atime_alone_reads_nothing_without_it(self):
        self.store('one')
        path = os.path.join(self.lab.tree, 'a')
        inode = os.stat(path).st_ino

        def later(st):
            return Stat(st, {'st_atime_ns': st.st_atime_ns + 10 ** 12}) \
                if st.st_ino == inode else st

        with mock.patch.object(os, 'stat', wrap(os.stat, later)), \
                reads() as read:
            self.host.create('two')
        self.assertEqual(read.call_count, 0)

    def test_device_number_alone_reads_nothing(self):
        """It differs with each mount of a snapshot."""
        self.store('one')

        def moved(st):
            return Stat(st, {'st_dev': st.st_dev + 1})

        with mock.patch.object(os, 'stat', wrap(os.stat, moved)), \
                mock.patch.object(os, 'fstat', wrap(os.fstat, moved)), \
                reads() as read:
            self.host.create('two')
        self.assertEqual(read.call_count, 0)

    @unittest.skipIf(not ROOT, 'needs root to mount')
    def test_bind_mount_reads_nothing(self):
        self.store('one')
        where = self.lab.path('mounted')
        os.mkdir(where)
        if subprocess.run(['mount', '--bind', self.lab.tree, where],
                          stderr=subprocess.DEVNULL).returncode:
            self.skipTest('mount --bind is not permitted here')
        try:
            with reads() as read:
                self.host.create('two', tree=where)
        finally:
            subprocess.run(['umount', '-l', where], check=True)
        self.assertEqual(read.call_count, 0)

    def test_each_field(self):
        """Change one thing of one file; it shows in the archive."""
        self.store('base')
        path = os.path.join(self.lab.tree, 'b/c')
        changes = [
            lambda: os.chmod(path, 0o4751),
            lambda: os.utime(path, ns=(1, 123456789)),
            lambda: os.utime(path, ns=(1, -5)),
            lambda: self.write('b/c', b'other'),
            lambda: os.link(path, path + '.link'),
            lambda: os.unlink(path + '.link'),
            lambda: (os.unlink(path), os.symlink('target', path)),
            lambda: (os.unlink(path), os.symlink('another', path)),
            lambda: (os.unlink(path), os.mkfifo(path)),
            lambda: (os.unlink(path), os.mkdir(path)),
            lambda: os.chmod(path, 0o700)]
        if ROOT:
            changes.append(lambda: os.chown(path, 12, 34))
        for number, change in enumerate(changes):
            change()
            self.store('change-%d' % number)

    def test_links_followed_or_not(self):
        os.symlink('a', os.path.join(self.lab.tree, 'link'))
        for number, flag in enumerate(('', '-L', '', '-L', '-H')):
            name = 'run-%d' % number
            self.host.good('-c', '-f', name, *[flag][:bool(flag)], '-C',
                           self.lab.tree, '.')
            found = snapshot(self.host.extract(name))
            self.assertEqual(stat.S_ISREG(found[b'link']['type']),
                             flag == '-L', (number, flag))

    def test_operand_that_is_a_link(self):
        os.symlink('b', os.path.join(self.lab.tree, 'link'))
        for number, flag in enumerate(('', '-H', '-L')):
            name = 'run-%d' % number
            self.host.good('-c', '-f', name, *[flag][:bool(flag)], '-C',
                           self.lab.tree, 'link')
            found = snapshot(self.host.extract(name))
            self.assertEqual(b'link/c' in found, bool(flag), flag)


class PageEdges(LabTest):
    """A page whose neighbours move is the page it was."""

    def setUp(self):
        super().setUp()
        self.names = ['f%02d' % number for number in range(30)]
        for name in self.names[5:25]:
            self.write(name, name.encode())

    def test_edges(self):
        """Grown at the end, at the start, in the middle; and shrunk."""
        with fine():
            self.store('base')
            for number, name in enumerate(
                    self.names[25:] + self.names[4::-1] + ['f10a', 'f24a']):
                self.write(name, b'new')
                self.store('grown-%d' % number)
            for number, name in enumerate(
                    [self.names[n] for n in (12, 13, 0, 29, 14, 15, 28)]):
                os.unlink(os.path.join(self.lab.tree, name))
                self.store('shrunk-%d' % number)

    def test_one_page_grows_at_its_end(self):
        """The archive ended with it, the page itself did not."""
        self.store('base')
        self.write('z', b'the last')
        self.store('grown')
        os.unlink(os.path.join(self.lab.tree, 'z'))
        self.store('shrunk')
        self.host.create('operand', '.', self.lab.tree)
        found = snapshot(self.host.extract('operand'))
        self.assertIn(b'f24', found)
        self.assertIn(os.fsencode(self.lab.tree[1:]) + b'/f24', found)

    def test_without_the_mark_of_the_end(self):
        """A final page that matches by its entries alone: this is what
        `final` is for, the file behind it would start a page of its own.
        """
        with mock.patch.object(tarsnap.Writer, 'page_ends',
                               lambda writer, member: False):
            self.store('base')
            self.write('z', b'the last')
            with lab.tapped() as log:
                self.store('grown')
        self.assertEqual(len(log.puts(b'i')), 1)


class Mutations(LabTest):
    """Sequences of changes; after each one the archive is the tree."""

    def setUp(self):
        super().setUp()
        self.rng = random.Random('%s-%d' % (self.id(), SEED))
        self.serial = 0
        for _ in range(40):
            self.make()

    def paths(self, want=None):
        out = []
        for top, folders, files in os.walk(os.fsencode(self.lab.tree)):
            for name in sorted(folders) + sorted(files):
                path = os.path.join(top, name)
                if want is None or want(os.lstat(path).st_mode):
                    out.append(path)
            folders.sort()
        return out

    def pick(self, want=None):
        paths = self.paths(want)
        return self.rng.choice(paths) if paths else None

    def fresh_path(self):
        self.serial += 1
        folders = self.paths(stat.S_ISDIR) + [os.fsencode(self.lab.tree)]
        name = self.rng.choice((
            b'n%d', b'n%d', b'.h%d', b'a b%d', b'\xff\xfe%d', b'l\n%d',
            'ü%d'.encode())) % self.serial
        return os.path.join(self.rng.choice(folders), name)

    def content(self):
        rng = self.rng
        size = rng.choice((0, 1, 17, 300, 1000, 1000, 2047, 2048, 5000,
                           30000, 100000))
        kind = rng.randrange(4)
        if kind == 0:
            return bytes(size)
        if kind == 1:
            return b'%d same ' % rng.randrange(5) * (size // 7)
        return rng.randbytes(size)

    def make(self):
        rng, path = self.rng, self.fresh_path()
        kind = rng.randrange(12)
        if kind < 7:
            with open(path, 'wb') as file:
                file.write(self.content())
        elif kind < 9:
            os.mkdir(path)
        elif kind == 9:
            os.symlink(rng.choice((b'x', b'../y', b'\xff')), path)
        elif kind == 10:
            with open(path, 'wb') as file:
                file.seek(rng.randrange(1, 200000))
                file.write(b'after a hole')
                file.truncate(rng.randrange(1, 300000))
        else:
            os.mkfifo(path)

    def mutate(self):
        """One change of the tree."""
        rng = self.rng
        kind = rng.randrange(14)
        path = self.pick(stat.S_ISREG if kind in (1, 2, 3, 4) else None)
        if path is None or kind == 0 or kind == 13:
            return self.make()
        regular = stat.S_ISREG(os.lstat(path).st_mode)
        if kind == 1:
            with open(path, 'wb') as file:
                file.write(self.content())
        elif kind == 2:
            with open(path, 'ab') as file:
                file.write(self.content())
        elif kind == 3:
            os.truncate(path, rng.randrange(5000))
        elif kind == 4:
            os.link(path, self.fresh_path())
        elif kind == 5:
            target = self.fresh_path()
            if not target.startswith(path + b'/'):
                os.rename(path, target)
        elif kind == 6 and not os.path.islink(path):
            special = 0o7777 if regular or os.path.isdir(path) else 0o777
            os.chmod(path, rng.randrange(0o10000) & special | 0o700)
        elif kind == 7:
            when = rng.choice((0, -1, 10 ** 18, 1600000000 * 10 ** 9)
                              ) + rng.randrange(10 ** 9)
            os.utime(path, ns=(when, when), follow_symlinks=False)
        elif kind == 8:
            shutil.rmtree(path) if os.path.isdir(path) and not \
                os.path.islink(path) else os.unlink(path)
        elif kind == 9 and os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
            with open(path, 'wb') as file:
                file.write(b'was a directory')
        elif kind == 10 and regular:
            os.unlink(path)
            os.mkdir(path)
        elif kind == 11 and ROOT:
            os.chown(path, rng.randrange(3), rng.randrange(3),
                     follow_symlinks=False)
        elif kind == 12 and regular and hasattr(os, 'setxattr'):
            with contextlib.suppress(OSError):
                os.setxattr(path, 'user.x%d' % rng.randrange(3),
                            rng.randbytes(rng.choice((0, 5, 5000))))
        return None

    def drive(self, between=lambda turn: None):
        with fine():
            for turn in range(RUNS):
                if turn:
                    for _ in range(self.rng.randrange(6)):
                        self.mutate()
                between(turn)
                self.store('run-%d' % turn)

    def test_cache_kept(self):
        self.drive()

    def test_cache_lost_now_and_then(self):
        def lose(turn):
            if self.rng.random() < 0.3:
                self.host.lose('cache')
            if self.rng.random() < 0.1:
                self.host.good('--fsck')
        self.drive(lose)

    def test_two_jobs_over_overlapping_operands(self):
        """Two profiles alternate; neither sees what the other's rows say."""
        tops = []

        def second(turn):
            folders = [path for path in self.paths(stat.S_ISDIR)
                       if os.path.dirname(path)
                       == os.fsencode(self.lab.tree)]
            tops[:] = [os.path.basename(path) for path in folders[:3]]
            if not tops:
                return
            args = ['--exclude', '*/n*7'] if turn % 2 else []
            name = 'part-%d' % turn
            self.host.good('-c', '-f', name, *args, '-C', self.lab.tree,
                           *tops)
            model = {
                path: row for path, row in snapshot(self.lab.tree).items()
                if path.split(b'/')[0] in tops and not (
                    args and re.match(rb'(?s).*/n.*7(/|\Z)', path))}
            found = snapshot(self.host.extract(name))
            del found[b'']
            for row in model.values():
                row['names'] = [n for n in row['names'] if n in model]
            self.assertEqual(lab.difference(model, found), [])

        self.drive(second)

    def test_deleted_and_made_between(self):
        """Old archives go as new ones come; those that stay are whole."""
        kept = {}

        def delete(turn):
            if turn > 3 and self.rng.random() < 0.7:
                self.host.good('-d', '-f', 'run-%d' % min(kept))
                del kept[min(kept)]
            kept[turn] = snapshot(self.lab.tree)

        self.drive(delete)
        for turn, model in kept.items():
            self.host.check('run-%d' % turn, model)


if __name__ == '__main__':
    unittest.main()
