# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Hostile archives: nothing outside the target is ever touched.

Each test makes a target and, beside it, things that must not change; the
state of these is compared before and after.
"""

import contextlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import storefake
import tarsnap
from tarsnap import CHARDEV, DIRECTORY, FIFO, SYMLINK

ROOT = os.geteuid() == 0
NOBODY = 65534


class HostileCase(unittest.TestCase):

    def setUp(self):
        self.base = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.base)
        os.chmod(self.base, 0o755)
        self.target = os.path.join(self.base, 'target')
        self.outside = os.path.join(self.base, 'outside')
        os.mkdir(self.target)
        os.mkdir(self.outside)
        self.write(self.outside, 'file', 'precious')
        self.store = storefake.Store()
        self.builder = storefake.Builder(self.store)
        self.before = self.state()

    def write(self, *path_and_data):
        with open(os.path.join(*path_and_data[:-1]), 'w') as file:
            file.write(path_and_data[-1])

    def state(self):
        """Everything outside of the target, but for link counts."""
        out = {}
        for top in (self.outside, '/tmp/..'):
            names = [top] if top != self.outside else [top] + [
                os.path.join(top, name) for name in sorted(os.listdir(top))]
            for name in names[:20]:
                status = os.lstat(name)
                data = b''
                if stat.S_ISREG(status.st_mode):
                    with open(name, 'rb') as file:
                        data = file.read()
                out[name] = (status.st_ino, status.st_mode, status.st_uid,
                             status.st_mtime_ns, data)
        out['here'] = sorted(name for name in os.listdir(self.base))
        return out

    def extract(self, ordered=None, finish=True, **given):
        """Extract it; (errors, stderr)."""
        if finish:
            self.builder.finish(ordered=ordered)
        given.setdefault('directories', [os.fsencode(self.target)])
        remote = storefake.FakeRemote(self.store)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            errors = tarsnap.mode_extract(remote, storefake.options(**given))
        self.assertEqual(self.state(), self.before)
        return errors, err.getvalue()

    def read(self, name):
        with open(os.path.join(self.target, name), 'rb') as file:
            return file.read()

    def add(self, *args, **fields):
        self.builder.add(*args, **fields)
        return self


class PathTest(HostileCase):

    def test_dotdot_is_refused_wherever_it_stands(self):
        bad = (b'../outside/file', b'..', b'a/../../outside/new', b'a/..',
               b'./../x', b'/../outside/file', b'a/b/../c')
        for path in bad:
            self.add(path, data=b'evil')
        self.add(b'..', DIRECTORY, mode=0).add(b'../outside', DIRECTORY)
        self.add(b'../link', SYMLINK, target=b'x').add(b'good', data=b'ok')
        errors, text = self.extract()
        self.assertEqual(errors, len(bad) + 3)
        self.assertIn("../outside/file: Path contains '..'\n", text)
        self.assertEqual(os.listdir(self.target), ['good'])

    def test_dotdot_in_a_name_is_just_a_name(self):
        self.add(b'..a', data=b'1').add(b'b..', data=b'2').add(b'...',
                                                               data=b'3')
        self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(sorted(os.listdir(self.target)),
                         ['...', '..a', 'b..'])

    def test_absolute_goes_below_the_target(self):
        path = os.fsencode(self.outside) + b'/file'
        self.add(path, data=b'evil').add(b'//two', data=b'2')
        errors, text = self.extract()
        self.assertEqual(errors, 0)
        self.assertEqual(text, "tarsnap: Removing leading '/' from member "
                               "names\n")
        self.assertEqual(self.read(os.fsdecode(path[1:])), b'evil')
        self.assertEqual(self.read('two'), b'2')

    def test_quiet_says_nothing_of_it(self):
        self.add(b'/a', data=b'1')
        self.assertEqual(self.extract(quiet=True), (0, ''))

    def test_absolute_with_P_is_absolute(self):
        path = os.fsencode(self.base) + b'/with-P/file'
        self.add(path, data=b'1')
        self.builder.finish()
        remote = storefake.FakeRemote(self.store)
        self.assertEqual(tarsnap.mode_extract(
            remote, storefake.options(absolute=True)), 0)
        with open(path, 'rb') as file:
            self.assertEqual(file.read(), b'1')

    def test_names_of_directories_for_files(self):
        self.add(b'.', data=b'evil').add(b'./', data=b'x').add(b'/',
                                                               data=b'x')
        errors, _ = self.extract()
        self.assertEqual(errors, 3)
        self.assertEqual(os.listdir(self.target), [])

    def test_the_target_itself(self):
        self.add(b'.', DIRECTORY, mode=0o711, mtime=10 ** 9)
        self.assertEqual(self.extract(), (0, ''))
        status = os.stat(self.target)
        self.assertEqual((stat.S_IMODE(status.st_mode), status.st_mtime_ns),
                         (0o711, 10 ** 9))

    def test_control_characters_do_not_reach_the_terminal(self):
        self.add(b'../\x1b[2J\n', data=b'').add(b'a\nb', data=b'1')
        _, text = self.extract(verbose=1)
        self.assertNotIn('\x1b', text)
        self.assertIn('x a\\nb\n', text)
        self.assertEqual(self.read('a\nb'), b'1')

    def test_empty_and_nul_names_never_get_so_far(self):
        # The decoder refuses them; the pages around go on.
        for path in (b'', b'a\0b'):
            store = self.store = storefake.Store()
            self.builder = storefake.Builder(store, per_page=1)
            self.add(b'before', data=b'1').add(path, data=b'evil')
            self.add(b'zz', data=b'2')
            errors, text = self.extract()
            self.assertEqual(errors, 1)
            self.assertIn('malformed row', text)
            self.assertEqual(self.read('zz'), b'2')

    def test_a_link_target_with_nul(self):
        self.add(b'l', SYMLINK, target=b'a\0b').add(b'z', data=b'1')
        errors, text = self.extract()
        self.assertEqual(errors, 1)
        self.assertTrue(text.startswith('l: '))
        self.assertEqual(os.listdir(self.target), ['z'])

    def test_component_too_long(self):
        self.add(b'x' * 300, data=b'1').add(b'y' * 300 + b'/z', data=b'1')
        self.add(b'good', data=b'1')
        errors, text = self.extract()
        self.assertEqual(errors, 2)
        self.assertIn('File name too long', text)


class SymlinkTest(HostileCase):

    def test_archived_link_then_write_through_it(self):
        outside = os.fsencode(self.outside)
        self.add(b'l', SYMLINK, target=outside)
        self.add(b'l/file', data=b'evil').add(b'l/new', data=b'evil')
        self.add(b'l/d/e', data=b'evil').add(b'm', SYMLINK, target=b'l')
        self.add(b'm/file', data=b'evil').add(b'm/l', SYMLINK, target=b'x')
        errors, text = self.extract()
        self.assertEqual(errors, 5)
        self.assertIn('l/file: Cannot extract through symlink l\n', text)
        self.assertEqual(os.readlink(os.path.join(self.target, 'l')),
                         self.outside)

    def test_link_there_before(self):
        os.symlink(self.outside, os.path.join(self.target, 'l'))
        self.add(b'l/file', data=b'evil')
        errors, text = self.extract()
        self.assertEqual(errors, 1)
        self.assertIn('through symlink', text)

    def test_U_takes_the_link_away(self):
        os.symlink(self.outside, os.path.join(self.target, 'l'))
        self.add(b'l/file', data=b'mine')
        self.assertEqual(self.extract(unlink_first=True), (0, ''))
        self.assertEqual(self.read('l/file'), b'mine')

    def test_P_goes_through(self):
        inside = os.path.join(self.target, 'real')
        os.mkdir(inside)
        os.symlink('real', os.path.join(self.target, 'l'))
        self.add(b'l/f', data=b'1')
        self.assertEqual(self.extract(absolute=True), (0, ''))
        self.assertEqual(self.read('real/f'), b'1')

    def test_directory_where_a_link_is(self):
        os.symlink(self.outside, os.path.join(self.target, 'd'))
        self.add(b'd', DIRECTORY, mode=0o700, mtime=1).add(b'd/f', data=b'1')
        self.assertEqual(self.extract(), (0, ''))
        path = os.path.join(self.target, 'd')
        self.assertFalse(os.path.islink(path))
        self.assertEqual(self.read('d/f'), b'1')

    def test_file_where_a_link_is(self):
        os.symlink(os.path.join(self.outside, 'file'),
                   os.path.join(self.target, 'f'))
        os.symlink(os.path.join(self.outside, 'new'),
                   os.path.join(self.target, 'g'))
        self.add(b'f', data=b'1').add(b'g', data=b'2')
        self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(self.read('f'), b'1')
        self.assertFalse(os.path.islink(os.path.join(self.target, 'f')))

    def test_archive_replaces_its_own_directory_by_a_link(self):
        outside = os.fsencode(self.outside)
        for ordered in (True, False):
            self.store = storefake.Store()
            self.builder = storefake.Builder(self.store)
            self.add(b'd', DIRECTORY, mode=0o777, mtime=1)
            self.add(b'd', SYMLINK, target=outside)
            self.add(b'd/file', data=b'evil')
            self.add(b'd', DIRECTORY, mode=0o4777, mtime=1)
            self.extract(ordered=ordered)

    def test_modes_and_times_are_not_set_through_links(self):
        outside = os.fsencode(self.outside)
        self.add(b'a', DIRECTORY, mode=0o777, mtime=1, xattrs=(
            (b'user.x', b'evil'),))
        self.add(b'b', data=b'x')
        self.add(b'a', SYMLINK, target=outside, mode=0o777, mtime=2)
        self.extract(ordered=False)
        self.assertTrue(os.path.islink(os.path.join(self.target, 'a')))

    def test_directories_replaced_while_extracting(self):
        # Whenever a file is opened, somebody replaces its directory.
        real, swapped = os.open, []

        def race(path, flags, *args, **fields):
            if path == b'victim':
                swapped.append(1)
                place = os.path.join(self.target, 'a', 'b')
                if not os.path.islink(place):
                    os.rename(place, place + '%d' % len(swapped))
                    os.symlink(self.outside, place)
            return real(path, flags, *args, **fields)

        self.add(b'a', DIRECTORY).add(b'a/b', DIRECTORY, mtime=1)
        self.add(b'a/b/victim', data=b'evil').add(b'a/b/file', data=b'evil')
        self.add(b'a/c', data=b'1').add(b'a/b/file', data=b'evil')
        with mock.patch.object(os, 'open', race):
            errors, text = self.extract(ordered=False)
        self.assertEqual(swapped, [1])
        self.assertEqual(errors, 1)
        self.assertIn('through symlink', text)
        self.assertEqual(self.read('a/b1/victim'), b'evil')


class LinkTest(HostileCase):

    def test_file_linked_elsewhere_is_not_written_into(self):
        os.link(os.path.join(self.outside, 'file'),
                os.path.join(self.target, 'f'))
        self.add(b'f', data=b'evil', mode=0o777)
        self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(self.read('f'), b'evil')

    def test_open_file_is_not_written_into(self):
        self.write(self.target, 'f', 'old')
        with open(os.path.join(self.target, 'f')) as file:
            self.add(b'f', data=b'new')
            self.extract()
            self.assertEqual(file.read(), 'old')

    def test_link_through_a_link_that_was_put_there(self):
        # The first name's directory is replaced before the second is made.
        link = (5, 0)
        self.add(b'd/f', data=b'data', link=link)
        self.add(b'd', SYMLINK, target=os.fsencode(self.outside))
        self.add(b'e', data=b'data', link=link)
        real = os.symlink

        def symlink(*args, **fields):
            os.rename(os.path.join(self.target, 'd'),
                      os.path.join(self.target, 'moved'))
            return real(*args, **fields)

        self.write(self.outside, 'f', 'not to be linked')
        self.before = self.state()
        with mock.patch.object(os, 'symlink', symlink):
            errors, _ = self.extract(ordered=False)
        self.assertEqual(errors, 0)
        self.assertEqual(self.read('e'), b'data')

    def test_first_name_replaced_by_another_file(self):
        link = (5, 0)
        self.add(b'a', data=b'data', link=link).add(b'b', data=b'other')
        self.add(b'c', data=b'data', link=link)
        real = os.open

        def swap(path, *args, **fields):
            if path == b'b':
                os.remove(os.path.join(self.target, 'a'))
                self.write(self.target, 'a', 'swap')
            return real(path, *args, **fields)

        with mock.patch.object(os, 'open', swap):
            self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(self.read('c'), b'data')
        self.assertEqual(self.read('a'), b'swap')

    def test_first_name_replaced_between_look_and_link(self):
        link = (5, 0)
        self.add(b'a', data=b'data', link=link)
        self.add(b'c', data=b'data', link=link)
        real = os.link

        def swap(*args, **fields):
            os.remove(os.path.join(self.target, 'a'))
            os.symlink(os.path.join(self.outside, 'file'),
                       os.path.join(self.target, 'a'))
            return real(*args, **fields)

        with mock.patch.object(os, 'link', swap):
            self.assertEqual(self.extract(), (0, ''))
        self.assertEqual(self.read('c'), b'data')
        self.assertFalse(os.path.islink(os.path.join(self.target, 'c')))

    def test_same_link_id_but_other_content(self):
        for field in ({'data': b'two'}, {'data': b'one', 'mtime': 7}):
            self.store = storefake.Store()
            self.builder = storefake.Builder(self.store)
            self.add(b'a', data=b'one', link=(5, 0))
            self.add(b'b', link=(5, 0), **field)
            self.assertEqual(self.extract(), (0, ''))
            self.assertEqual(self.read('b'), field['data'])
            self.assertEqual(self.read('a'), b'one')


@unittest.skipUnless(ROOT, 'needs root, to become somebody else')
class OtherUserTest(HostileCase):

    def as_nobody(self, ordered=None, **given):
        """(errors, stderr) of an extraction by an ordinary user."""
        os.chown(self.target, NOBODY, NOBODY)
        self.builder.finish(ordered=ordered)
        self.before = self.state()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 255
            try:
                os.close(reader)
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                sys.stderr = io.StringIO()
                status = tarsnap.mode_extract(
                    storefake.FakeRemote(self.store), storefake.options(
                        directories=[os.fsencode(self.target)], **given))
                os.write(writer, sys.stderr.getvalue().encode())
            finally:
                os._exit(status)
        os.close(writer)
        with open(reader) as file:
            text = file.read()
        _, status = os.waitpid(child, 0)
        self.assertEqual(self.state(), self.before)
        return os.WEXITSTATUS(status), text

    def mode(self, name):
        return stat.S_IMODE(os.lstat(os.path.join(self.target,
                                                  name)).st_mode)

    def test_devices_are_an_error_each(self):
        self.add(b'null', CHARDEV, device=(1, 3)).add(b'f', data=b'1')
        self.add(b'p', FIFO)
        errors, text = self.as_nobody()
        self.assertEqual(errors, 1)
        self.assertIn('null: Only root can make a device\n', text)
        self.assertEqual(sorted(os.listdir(self.target)), ['f', 'p'])

    def test_setuid_of_root_does_not_become_ours(self):
        for given in ({}, {'perms': True}):
            self.store = storefake.Store()
            self.builder = storefake.Builder(self.store)
            self.add(b's', data=b'1', mode=0o6755)
            self.add(b'd', DIRECTORY, mode=0o2755)
            self.as_nobody(**given)
            self.assertEqual(self.mode('s'), 0o755)
            self.assertEqual(self.mode('d'), 0o755)

    def test_setuid_of_our_own_comes_back_with_p(self):
        own = {'uid': NOBODY, 'gid': NOBODY}
        self.add(b's', data=b'1', mode=0o4755, **own)
        self.assertEqual(self.as_nobody(perms=True), (0, ''))
        self.assertEqual(self.mode('s'), 0o4755)

    def test_without_p_the_umask_counts(self):
        self.add(b'f', data=b'1', mode=0o666)
        self.add(b'd', DIRECTORY, mode=0o777)
        old = os.umask(0o027)
        try:
            self.as_nobody()
        finally:
            os.umask(old)
        self.assertEqual((self.mode('f'), self.mode('d')), (0o640, 0o750))

    def test_privileged_attributes_are_warned_of_once(self):
        for name in (b'a', b'b'):
            self.add(name, data=b'1', xattrs=((b'trusted.x', b'1'),))
        errors, text = self.as_nobody(perms=True)
        self.assertEqual((errors, text.count('\n')), (0, 1))
        self.assertIn('trusted.*', text)

    def test_a_read_only_directory_is_filled_again(self):
        self.add(b'd', DIRECTORY, mode=0o500).add(b'd/f', data=b'1')
        self.assertEqual(self.as_nobody(), (0, ''))
        self.assertEqual(self.as_nobody(), (0, ''))
        self.assertEqual(self.mode('d'), 0o500)

    def test_directories_that_shut_their_owner_out(self):
        for ordered in (True, False):
            self.store = storefake.Store()
            self.builder = storefake.Builder(self.store)
            self.add(b'a', DIRECTORY, mode=0o600, mtime=5)
            self.add(b'a/b', DIRECTORY, mode=0, mtime=6)
            self.add(b'a/b/c', DIRECTORY, mode=0o700, mtime=7)
            self.add(b'a/b/c/f', data=b'1')
            self.assertEqual(self.as_nobody(ordered, perms=True), (0, ''))
            for name, mode, mtime in (('a', 0o600, 5), ('a/b', 0, 6),
                                      ('a/b/c', 0o700, 7)):
                self.assertEqual(self.mode(name), mode)
                self.assertEqual(os.stat(os.path.join(
                    self.target, name)).st_mtime_ns, mtime)
            shutil.rmtree(os.path.join(self.target, 'a'))

    def test_through_a_directory_we_may_not_list(self):
        os.mkdir(os.path.join(self.target, 'x'))
        os.mkdir(os.path.join(self.target, 'x', 'y'))
        os.chown(os.path.join(self.target, 'x', 'y'), NOBODY, NOBODY)
        os.chmod(os.path.join(self.target, 'x'), 0o711)
        self.add(b'x/y/f', data=b'1')
        self.assertEqual(self.as_nobody(), (0, ''))


@unittest.skipUnless(ROOT, 'needs root')
class RootTest(HostileCase):

    def mode(self, name):
        return stat.S_IMODE(os.lstat(os.path.join(self.target,
                                                  name)).st_mode)

    def test_setuid_only_with_its_owner(self):
        self.add(b's', data=b'1', mode=0o4755, uid=NOBODY, gid=NOBODY)
        self.extract()
        self.assertEqual(self.mode('s'), 0o4755)
        self.assertEqual(os.stat(os.path.join(self.target, 's')).st_uid,
                         NOBODY)
        self.extract(finish=False, own=False)
        self.assertEqual(self.mode('s'), 0o755)
        self.assertEqual(os.stat(os.path.join(self.target, 's')).st_uid, 0)

    def test_in_a_setgid_directory_files_get_their_own_group(self):
        os.chown(self.target, 0, NOBODY)
        os.chmod(self.target, 0o2777)
        self.add(b'a', data=b'1', mode=0o2755).add(b'b', data=b'1')
        self.assertEqual(self.extract(), (0, ''))
        for name in ('a', 'b'):
            self.assertEqual(
                os.stat(os.path.join(self.target, name)).st_gid, 0)
        self.assertEqual(self.mode('a'), 0o2755)

    def test_full_disk_is_one_clear_line(self):
        small = os.path.join(self.target, 'small')
        os.mkdir(small)
        made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k',
                               'none', small], capture_output=True)
        if made.returncode:
            self.skipTest('cannot mount a tmpfs')
        try:
            self.add(b'a', data=b'1').add(b'big', data=bytes(range(256))
                                          * 1024).add(b'c', data=b'2')
            with self.assertRaisesRegex(
                    tarsnap.UserError, '^big: No space left on device$'):
                self.extract(directories=[os.fsencode(small)])
            self.assertEqual(os.listdir(small), ['a'])
        finally:
            subprocess.run(['umount', small], check=True)


class DeepTest(HostileCase):

    def test_paths_longer_than_any_the_kernel_takes(self):
        parts = [b'%04d' % number + b'x' * 196 for number in range(300)]
        deep = b'/'.join(parts)
        self.assertGreater(len(deep), 60000)
        for ordered in (True, False):
            for number in range(1, 301):
                self.add(b'/'.join(parts[:number]), DIRECTORY, mode=0o750,
                         mtime=number * 10 ** 9)
            self.add(deep + b'/f', data=b'deep')
            self.assertEqual(self.extract(ordered=ordered), (0, ''))
            self.check(parts)
            self.store = storefake.Store()
            self.builder = storefake.Builder(self.store)

    def check(self, parts):
        fd = os.open(self.target, os.O_RDONLY)
        for number, part in enumerate(parts, 1):
            below = os.open(part, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
            status = os.fstat(fd)
            self.assertEqual((status.st_mtime_ns, status.st_mode & 0o777),
                             (number * 10 ** 9, 0o750))
        file = os.open(b'f', os.O_RDONLY, dir_fd=fd)
        self.assertEqual(os.read(file, 10), b'deep')
        os.close(file)
        os.close(fd)

    def test_no_descriptor_is_left_open(self):
        before = len(os.listdir('/proc/self/fd'))
        self.add(b'a/b/c', data=b'1').add(b'a/../x', data=b'1')
        self.add(b'a/b/c/d', data=b'1').add(b'e', SYMLINK, target=b'a')
        self.add(b'e/f', data=b'1').add(b'z/y', DIRECTORY, mtime=1)
        self.extract(ordered=False)
        self.assertEqual(len(os.listdir('/proc/self/fd')), before)


if __name__ == '__main__':
    unittest.main()
