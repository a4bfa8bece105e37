# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What options take into an archive or leave out of it, in -c, -t and -x."""

import contextlib
import fcntl
import os
import pty
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
import unittest
from unittest import mock

import lab
import tarsnap
import world

SECOND = 10 ** 9
NOW = 1795405800 * SECOND           # Mon Nov 23 03:50:00 2026 UTC
MIDNIGHT = 1795392000               # of that day
SIGNATURE = b'Signature: 8a477f597d28d172789f06886806bc55'

DATES = (
    # text, seconds since 1970 in UTC
    ('@1700000000', 1700000000),
    ('@-5', -5),
    ('2026-11-23', MIDNIGHT),
    ('2026-11-23 04:05', MIDNIGHT + 14700),
    ('2026-11-23T04:05:06Z', MIDNIGHT + 14706),
    ('2026-11-23 04:05:06 +0200', MIDNIGHT + 7506),
    ('2026-11-23 04:05:06-05:30', MIDNIGHT + 34506),
    ('2026-11-23 04:05 EST', MIDNIGHT + 32700),
    ('20261123', MIDNIGHT),
    ('20261123T040506', MIDNIGHT + 14706),
    ('2026/11/23', MIDNIGHT),
    ('11/23/2026', MIDNIGHT),
    ('11/23/26', MIDNIGHT),
    ('11/23', MIDNIGHT),
    ('23 Nov 2026', MIDNIGHT),
    ('23-nov-2026', MIDNIGHT),
    ('November 23, 2026 4:05 pm', MIDNIGHT + 57900),
    ('Nov 23rd', MIDNIGHT),
    ('Mon, 23 Nov 2026 04:05:06 +0000', MIDNIGHT + 14706),
    ('12am', MIDNIGHT),
    ('noon', MIDNIGHT + 43200),
    ('midnight', MIDNIGHT),
    ('now', NOW // SECOND),
    ('today', NOW // SECOND),
    ('yesterday', NOW // SECOND - 86400),
    ('tomorrow 10:00', MIDNIGHT + 86400 + 36000),
    ('now - 1 week', NOW // SECOND - 7 * 86400),
    ('3 days ago', NOW // SECOND - 3 * 86400),
    ('a fortnight ago', NOW // SECOND - 14 * 86400),
    ('1 hour 30 minutes ago', NOW // SECOND + 3600 - 1800),
    ('-2 hours -3 sec', NOW // SECOND - 7203),
    ('last month', NOW // SECOND - 31 * 86400),
    ('last year', NOW // SECOND - 365 * 86400),
    ('2026-11-23 - 1 day', MIDNIGHT - 86400),
    ('monday', MIDNIGHT),
    ('last monday', MIDNIGHT - 7 * 86400),
    ('next tuesday', MIDNIGHT + 86400),
)
NO_DATES = ('', 'soon', '2026-13-01', '2026-02-29', '25:00', '10:60', '13pm',
            '2026-11-23 2026-11-24', '10:00 11:00', '2026-11-23x', '@', '-',
            '5 parsecs ago', '@5 10:00', '99999999 years')


class DateTest(unittest.TestCase):

    def setUp(self):
        zone = os.environ.get('TZ')
        self.addCleanup(self.zone, zone)
        self.zone('UTC')

    def zone(self, name):
        os.environ.pop('TZ', None)
        if name is not None:
            os.environ['TZ'] = name
        time.tzset()

    def test_dates(self):
        for text, seconds in DATES:
            for written in (text, text.upper()):
                with self.subTest(written):
                    self.assertEqual(tarsnap.date_parse(written, NOW),
                                     seconds * SECOND)

    def test_the_time_zone_is_the_local_one(self):
        self.zone('EST5EDT')
        self.assertEqual(tarsnap.date_parse('2026-11-23', NOW),
                         (MIDNIGHT + 5 * 3600) * SECOND)
        self.assertEqual(tarsnap.date_parse('2026-07-01'),
                         tarsnap.date_parse('2026-07-01 04:00 UTC'))

    def test_fractions(self):
        for text, nanos in (('@5.25', 5250000000), ('@-5.25', -5250000000),
                            ('2026-11-23 00:00:00.000000001',
                             MIDNIGHT * SECOND + 1)):
            with self.subTest(text):
                self.assertEqual(tarsnap.date_parse(text, NOW), nanos)

    def test_no_dates(self):
        for text in NO_DATES:
            with self.subTest(text), self.assertRaisesRegex(
                    tarsnap.UserError, 'Not a date'):
                tarsnap.date_parse(text, NOW)


class Select(lab.LabTest):

    def members(self, *args, name='a'):
        """What -c with these options stores of the tree."""
        self.host.good('-c', '-f', name, *args, '-C', self.lab.tree, '.')
        return self.listed(name)

    def listed(self, name, *args):
        return self.host.good('-t', '-f', name, *args,
                              cache=False).out.splitlines()

    def restored(self, name, *args):
        where = self.host.extract(name, *args)
        return sorted(path.decode() for path, row in
                      lab.snapshot(where).items()
                      if row['type'] != 0o040000)


class NewerTest(Select):

    def setUp(self):
        super().setUp()
        for name, mtime in (('d/old', 1000), ('d/new', 2000),
                            ('d/same', 1500)):
            self.write(name, b'x', mtime * SECOND)
        os.utime(self.lab.path('tree', 'd'), (1, 1))
        os.utime(self.lab.tree, (1, 1))

    def test_newer_mtime_is_strict_and_descends(self):
        for date, stored in (('@1500', ['./d/new']),
                             ('@1499', ['./d/new', './d/same']),
                             ('@1499.999999999', ['./d/new', './d/same']),
                             ('1970-01-01 00:25:00 UTC', ['./d/new']),
                             ('@9999', [])):
            with self.subTest(date):
                self.assertEqual(self.members('--newer-mtime', date,
                                              name='c ' + date), stored)

    def test_newer_mtime_than_has_nanoseconds(self):
        mark = self.lab.path('mark')
        with open(mark, 'w'):
            pass
        for nanos, stored in ((1500 * SECOND, ['./d/new']),
                              (1500 * SECOND - 1, ['./d/new', './d/same'])):
            os.utime(mark, ns=(nanos, nanos))
            with self.subTest(nanos):
                self.assertEqual(self.members(
                    '--newer-mtime-than', mark, name=str(nanos)), stored)

    def test_newer_is_about_ctime(self):
        mark = self.lab.path('mark')
        time.sleep(0.02)
        with open(mark, 'w'):
            pass
        time.sleep(0.02)
        self.write('d/late', b'x', 500 * SECOND)
        os.utime(self.lab.path('tree', 'd'), (1, 1))
        for option in ('--newer-than', '--newer-ctime-than'):
            with self.subTest(option):
                self.assertEqual(self.members(option, mark, name=option),
                                 ['./d/', './d/late'])
        for option in ('--newer', '--newer-ctime'):
            with self.subTest(option):
                date = '@%d.%09d' % divmod(os.stat(mark).st_ctime_ns, SECOND)
                self.assertEqual(self.members(option, date, name=option),
                                 ['./d/', './d/late'])

    def test_a_file_is_not_newer_than_itself(self):
        time.sleep(0.02)
        path = self.write('d/late')
        for option in ('--newer-than', '--newer-mtime-than'):
            with self.subTest(option):
                self.assertNotIn('./d/late',
                                 self.members(option, path, name=option))

    def test_all_limits_hold(self):
        self.assertEqual(self.members('--newer-mtime', '@1600',
                                      '--newer-mtime', '@900', '--newer',
                                      '@5'), ['./d/new'])

    def test_t_and_x_have_the_modification_time_only(self):
        self.members()
        for option in ('--newer', '--newer-mtime'):
            with self.subTest(option):
                self.assertEqual(self.listed('a', option, '@1500'),
                                 ['./d/new'])
                self.assertEqual(self.restored('a', option, '@1500'),
                                 ['d/new'])

    def test_wrong_dates_and_files(self):
        for args, said in ((('--newer', 'soon'), 'Not a date: "soon"'),
                           (('--newer-than', 'nowhere'),
                            'Cannot stat nowhere: ')):
            result = self.host.run('-c', '-f', 'x', *args, '.')
            self.assertEqual(result.status, 1)
            self.assertTrue(result.err.startswith('tarsnap: %s: %s' % (
                args[0], said)), result)

    def test_the_memo_after_a_selection(self):
        for number in range(60):
            self.write('e/%02d' % number, b'%d' % number, 1000 * SECOND)
        with lab.fine():
            self.store('all')
            for name, args in (('none', ('--newer-mtime', '@1990')),
                               ('exclude', ('--exclude', 'e'))):
                self.members(*args, name=name)
                self.store('all after ' + name)


class ListTest(Select):
    """-T in -t and -x."""

    def setUp(self):
        super().setUp()
        for name in ('a', 'd/b', 'd/c', '-C'):
            self.write(name)
        self.host.create('all')

    def list(self, data):
        path = self.lab.fresh('list')
        with open(path, 'wb') as file:
            file.write(data)
        return path

    def test_list_file_rules(self):
        for rule, data, args, picked in (
                ('names', b'a\nd/b', (), ['a', 'd/b']),
                ('a directory', b'd/\r\n', (), ['d/b', 'd/c']),
                ('and operands', b'a\n', ('d/c',), ['a', 'd/c']),
                ('-C is a name', b'-C\n', (), ['-C']),
                ('NULs', b'a\0d/b\0', ('--null',), ['a', 'd/b']),
                ('patterns', b'd/*', (), ['d/b', 'd/c'])):
            with self.subTest(rule):
                flags = [arg for arg in args if arg.startswith('-')]
                rest = [arg for arg in args if not arg.startswith('-')]
                self.assertEqual(self.restored(
                    'all', *flags, '-T', self.list(data), *rest), picked)

    def test_what_the_list_misses_is_named(self):
        result = self.host.run('-t', '-f', 'all', '-T',
                               self.list(b'nowhere\na'), cache=False)
        self.assertEqual(result.status, 1)
        self.assertEqual(result.out, './a\n')
        self.assertIn('tarsnap: nowhere: Not found in archive\n', result.err)

    def test_an_empty_list_chooses_nothing(self):
        for mode in ('-t', '-x'):
            result = self.host.run(mode, '-f', 'all', '-T',
                                   self.list(b'\n\n'), '-C', self.lab.root,
                                   cache=False)
            self.assertEqual((result.status, result.out), (1, ''))
            self.assertIn('is empty: nothing is chosen', result.err)

    def test_exclude_from(self):
        self.assertEqual(self.restored('all', '-X', self.list(b'd\n-C')),
                         ['a'])


class TagTest(Select):
    """Directories that say they are not worth keeping."""

    def setUp(self):
        super().setUp()
        for name, data in (('cache/CACHEDIR.TAG', SIGNATURE + b'\n# by me'),
                           ('cache/big', b'x'), ('cache/d/f', b''),
                           ('false/CACHEDIR.TAG', SIGNATURE[:-1]),
                           ('false/f', b''), ('marked/.nobackup', b''),
                           ('marked/f', b''), ('marked/sub/f', b'')):
            self.write(name, data)
        self.everything = self.members(name='all')

    def without(self, *names):
        return [line for line in self.everything
                if not line.startswith(names)]

    def test_exclude_caches(self):
        wanted = self.without('./cache/big', './cache/d')
        self.assertIn('./cache/CACHEDIR.TAG', wanted)
        self.assertEqual(self.members('--exclude-caches'), wanted)
        self.assertEqual(self.members(name='after'), self.everything)

    def test_exclude_caches_in_a_configuration_file(self):
        path = self.lab.path('conf')
        with open(path, 'w') as file:
            file.write('exclude-caches\nexclude-if-present .nobackup\n')
        self.assertEqual(
            self.members('--configfile', path),
            self.without('./cache/big', './cache/d', './marked/f',
                         './marked/sub'))
        self.assertEqual(
            self.members('--no-exclude-caches', '--configfile', path,
                         name='no'),
            self.without('./marked/f', './marked/sub'))

    def test_a_tag_that_is_no_file(self):
        os.mkdir(self.lab.path('tree', 'false', 'sub'))
        os.mkdir(self.lab.path('tree', 'false', 'sub', 'CACHEDIR.TAG'))
        self.assertIn('./false/sub/CACHEDIR.TAG/',
                      self.members('--exclude-caches'))

    def test_exclude_if_present(self):
        wanted = self.without('./marked/f', './marked/sub')
        self.assertIn('./marked/.nobackup', wanted)
        self.assertEqual(self.members('--exclude-if-present', '.nobackup',
                                      '--exclude-if-present', 'none'), wanted)
        # An operand is a directory like others.
        self.host.good('-c', '-f', 'b', '--exclude-if-present', '.nobackup',
                       '-C', self.lab.tree, 'marked')
        self.assertEqual(self.listed('b'), ['marked/', 'marked/.nobackup'])

    def test_the_memo_is_not_misled(self):
        with lab.fine():
            self.store('before')
            self.members('--exclude-caches', '--exclude-if-present',
                         '.nobackup', name='less')
            self.store('after')

    def test_a_name_is_a_name(self):
        result = self.host.run('-c', '-f', 'x', '--exclude-if-present',
                               'a/b', '.')
        self.assertEqual(result.status, 1)
        self.assertIn('Not a name in a directory: a/b', result.err)


class NodumpTest(Select):

    def setUp(self):
        super().setUp()
        for name in ('plain', 'flagged', 'd/f', 'e/f'):
            self.write(name)
        self.flags = set()          # st_ino of what has the flag

    def flag(self, name):
        """Set the flag nodump; pretend to, where the disk has none."""
        path = self.lab.path('tree', name)
        if not flag_set(path):
            self.flags.add(os.stat(path).st_ino)
            patch = mock.patch.object(
                tarsnap.Walk, 'flagged', lambda walk, folder, name, st:
                st.st_ino in self.flags)
            patch.start()
            self.addCleanup(patch.stop)

    def test_nodump_leaves_out_files_and_directories(self):
        everything = self.members(name='all')
        self.flag('flagged')
        self.flag('d')
        less = ['./', './e/', './e/f', './plain']
        self.assertEqual(self.members('--nodump', name='less'), less)
        self.assertEqual(self.members('--no-nodump', name='no'), everything)
        self.assertEqual(self.members(name='default'), everything)
        path = self.lab.path('conf')
        with open(path, 'w') as file:
            file.write('nodump\n')
        self.assertEqual(self.members('--configfile', path, name='conf'),
                         less)
        self.assertEqual(self.members('--no-nodump', '--configfile', path,
                                      name='over'), everything)

    def test_the_memo_is_not_misled(self):
        for number in range(30):
            self.write('d/%d' % number, b'%d' % number)
        with lab.fine():
            self.store('one')
            self.flag('d/7')
            self.assertNotIn('./d/7', self.members('--nodump', name='less'))
            self.store('two')

    def test_what_cannot_be_opened_is_reported_once(self):
        if lab.ROOT:
            self.write('unreadable')
            patch = mock.patch.object(tarsnap, 'open_at', refuse_open)
            patch.start()
            self.addCleanup(patch.stop)
        else:
            os.chmod(self.write('unreadable'), 0)
        result = self.host.run('-c', '-f', 'a', '--nodump', '-C',
                               self.lab.tree, '.')
        self.assertEqual(result.status, 2, result)
        self.assertEqual(result.err.count('unreadable'), 1, result.err)
        self.assertIn('./plain', self.listed('a'))


class TimesTest(Select):

    def test_noatime(self):
        path = self.write('f', b'x' * 100000)
        if not tarsnap.NOATIME:
            result = self.host.run('-c', '-f', 'a', '--noatime', '-C',
                                   self.lab.tree, '.')
            self.assertIn('--noatime has no effect', result.err)
            return
        opened = []
        real = os.open

        def spy(name, flags, *args, **options):
            opened.append((os.fsdecode(name), flags))
            return real(name, flags, *args, **options)

        with mock.patch.object(os, 'open', spy):
            self.members('--noatime')
        flags = {name: flags for name, flags in opened
                 if flags & tarsnap.NOATIME}
        self.assertEqual(set(flags) - {self.lab.tree}, {'.', 'f'})
        # Whoever does not own a file may not ask for it, and need not.
        os.utime(path, (5, 5))

        def strict(name, flags, *args, **options):
            if flags & tarsnap.NOATIME:
                raise PermissionError(1, 'Operation not permitted')
            return real(name, flags, *args, **options)

        with mock.patch.object(os, 'open', strict):
            self.assertEqual(self.members('--noatime', name='b'),
                             ['./', './f'])

    def test_snaptime_distrusts_what_changed_after_it(self):
        # RACY is 0 here: all that changed before the run is believed.
        mark = self.write('mark')
        time.sleep(0.05)
        path = self.write('f', b'before')
        st = os.stat(path)
        self.members('--snaptime', mark, name='one')
        with mock.patch.object(tarsnap.Writer, 'unchanged',
                               return_value=None) as looked:
            self.members('--snaptime', mark, name='two')
            self.assertIn(b'', [call[0][1] for call in looked.call_args_list
                                if call[0][0] == b'./f'])
        # A change that neither size nor time betrays: of the same tick as
        # the snapshot, so that the times are put back here.
        with open(path, 'r+b') as file:
            file.write(b'after!')
        real = tarsnap.Writer.stat_key

        def stale(writer, member, now):
            if member == b'./f':
                now = Stale(now, st)
            return real(writer, member, now)

        with mock.patch.object(tarsnap.Writer, 'stat_key', stale):
            self.members('--snaptime', mark, name='three')
        with open(os.path.join(self.host.extract('three'), 'f'),
                  'rb') as file:
            self.assertEqual(file.read(), b'after!')

    def test_snaptime_of_a_missing_file(self):
        result = self.host.run('-c', '-f', 'a', '--snaptime', 'nowhere', '.')
        self.assertEqual(result.status, 1)
        self.assertTrue(result.err.startswith(
            'tarsnap: --snaptime: Cannot stat nowhere: '), result)

    def test_store_atime(self):
        path = self.write('f', b'x')
        os.utime(path, (1000, 2000))
        for name, args in (('no', ('--no-store-atime',)),
                           ('yes', ('--store-atime',)), ('off', ())):
            # Reading may have moved it.
            os.utime(path, (1000, 2000))
            self.members(*args, name=name)
            restored = os.stat(os.path.join(self.host.extract(name), 'f'))
            self.assertEqual(restored.st_mtime, 2000)
            with self.subTest(name):
                self.assertEqual(restored.st_atime == 1000, name == 'yes')

    def test_disk_pause(self):
        self.write('large', bytes(200000))
        self.write('small', b'x')
        with mock.patch.object(time, 'sleep') as sleep:
            self.host.run('-c', '-f', 'a', '--disk-pause', '7', '-C',
                          self.lab.tree, '.')
        pauses = [call for call in sleep.call_args_list
                  if call == mock.call(0.007)]
        self.assertEqual(len(pauses), 3 + 4)     # entries, 64 KB
        self.assertEqual(self.restored('a'), ['large', 'small'])
        for wrong in ('-1', '1001', 'x'):
            result = self.host.run('-c', '-f', 'b', '--disk-pause', wrong,
                                   '.')
            self.assertEqual(result.status, 1)
            self.assertIn('--disk-pause: ', result.err)


class LinkTest(Select):

    def test_missing_names_are_told(self):
        path = self.write('d/f', b'x')
        os.link(path, self.lab.path('tree', 'd', 'g'))
        os.link(path, self.lab.path('outside'))
        os.link(self.write('h'), self.lab.path('tree', 'i'))
        for name in ('first', 'unchanged'):
            for option in ('-l', '--check-links'):
                result = self.host.run('-c', '-f', name + option, option,
                                       '-C', self.lab.tree, '.')
                self.assertEqual(result.status, 0)
                self.assertEqual(
                    [line for line in result.err.splitlines()
                     if 'created for' not in line],
                    ['tarsnap: ./d/f: 1 of its 3 names are missing in the '
                     'archive'])
        self.assertEqual(self.host.good('-c', '-f', 'quiet', '-C',
                                        self.lab.tree, '.').err, '')


class MetadataTest(Select):

    def test_dry_run_metadata_reads_nothing(self):
        os.chmod(self.write('f', b'x' * 5000), 0)
        self.write('d/g')
        with mock.patch.object(tarsnap, 'pread_exactly', self.fail), \
                mock.patch.object(tarsnap, 'read_exactly', self.fail):
            result = lab.run(['--no-default-config', '-c', '-v',
                              '--dry-run-metadata', '-C', self.lab.tree, '.'])
        self.assertEqual((result.status, result.out), (0, ''))
        self.assertEqual(result.err, 'a .\na ./d\na ./d/g\na ./f\n')

    def test_it_works_beside_a_used_cache_directory(self):
        self.write('f')
        self.host.create('a')
        seq = self.host.seq()
        result = self.host.good('-c', '-v', '--dry-run-metadata', '-f', 'a',
                                '-C', self.lab.tree, '.')
        self.assertEqual(result.err, 'a .\na ./f\n')
        self.assertEqual(self.host.seq(), seq)

    def test_it_excludes_statistics_and_the_other_dry_run(self):
        for args, said in ((('--print-stats',), 'excludes --print-stats'),
                           (('--dry-run',), 'Only one of --dry-run-metadata '
                                            'and --dry-run may be given')):
            result = lab.run(['--no-default-config', '-c',
                              '--dry-run-metadata', *args, '.'])
            self.assertEqual(result.status, 1)
            self.assertIn(said, result.err)

    def test_print_stats_from_a_configuration_file_too(self):
        path = self.lab.path('conf')
        with open(path, 'w') as file:
            file.write('print-stats\n')
        result = lab.run(['--no-default-config', '--configfile', path, '-c',
                          '--dry-run-metadata', '.'])
        self.assertEqual(result.status, 1)
        self.assertIn('excludes --print-stats', result.err)


class WarningTest(Select):
    """Of 3.11, those of -c; --quiet silences the common ones."""

    def said(self, *args, status=0):
        result = self.host.run('-c', *args)
        self.assertEqual(result.status, status, result)
        return [line for line in result.err.splitlines()
                if 'created for' not in line]

    def test_common_warnings_and_quiet(self):
        self.write('d/f')
        self.host.cache = self.lab.path('tree', 'cache')
        for what, args, said in (
                ('leading slash', (self.lab.path('tree', 'd'),),
                 "Removing leading '/' from member names"),
                ('no files', ('-T', os.devnull),
                 'Archive contains no files'),
                ('cache directory', ('-C', self.lab.tree, '.'),
                 'Not adding cache directory to archive: ./cache')):
            with self.subTest(what):
                self.assertEqual(self.said('-f', what, *args),
                                 ['tarsnap: ' + said])
                self.assertEqual(self.said('-f', what + ' 2', '--quiet',
                                           *args), [])
        self.assertEqual(self.listed('cache directory'),
                         ['./', './d/', './d/f'])

    def test_a_file_that_grows(self):
        path = self.write('f', b'x' * 100)
        real = tarsnap.read_exactly

        def grow(fd, size):
            with open(path, 'ab') as file:
                file.write(b'more')
            return real(fd, size)

        for number, (args, said) in enumerate((
                ((), ['tarsnap: ./f: file may have grown while being '
                      'archived']), (('--quiet',), []))):
            with mock.patch.object(tarsnap, 'read_exactly', grow):
                self.assertEqual(self.said('-f', str(number), *args, '-C',
                                           self.lab.tree, '.'), said)

    def test_special_file_systems_are_not_entered(self):
        self.write('d/f')
        inside = os.stat(self.lab.path('tree', 'd')).st_dev
        real, types = tarsnap.Walk.push, {inside: 'proc'}

        def push(walk, stack, folder, member, st, parents, device):
            if parents is not None:         # as if mounted here
                parents = (parents[0], -1)
            real(walk, stack, folder, member, st, parents, device)

        with mock.patch.object(tarsnap.Walk, 'push', push), \
                mock.patch.object(tarsnap, 'mount_types', lambda: types):
            said = ['tarsnap: Not descending into filesystem of type proc: '
                    './d']
            for name, args, lines, members in (
                    ('a', (), said, ['./', './d/']),
                    ('b', ('--quiet',), [], ['./', './d/']),
                    ('c', ('--insane-filesystems',), [],
                     ['./', './d/', './d/f'])):
                self.assertEqual(self.said('-f', name, *args, '-C',
                                           self.lab.tree, '.'), lines)
                self.assertEqual(self.listed(name), members)

    def test_what_is_missing_or_shut_leaves_status_2(self):
        self.write('good')
        self.assertEqual(
            self.said('-f', 'a', '-C', self.lab.tree, 'gone', 'good',
                      status=2)[:2],
            ['tarsnap: gone: Cannot stat: No such file or directory',
             'tarsnap: Error exit delayed from previous errors.'])
        self.assertEqual(self.listed('a'), ['good'])
        self.write('unreadable')
        with mock.patch.object(tarsnap, 'open_at', refuse_open):
            lines = self.said('-f', 'b', '-C', self.lab.tree, '.', status=2)
        self.assertEqual(lines[0], 'tarsnap: ./unreadable: Cannot read: '
                                   'Permission denied')
        self.assertEqual(self.listed('b'), ['./', './good'])

    def test_sockets_are_skipped_in_silence(self):
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(self.lab.tree)
            self.addCleanup(os.chdir, os.getcwd())
            listener.bind('socket')
            self.assertEqual(self.said('-f', 'a', '-C', self.lab.tree, '.'),
                             [])
        self.assertEqual(self.listed('a'), ['./'])


class AskTest(Select):
    """-w on a terminal, which is descriptor 2."""

    def terminal(self, answers, *args):
        """(status, what the terminal showed) of a run of the program."""
        ours, theirs = pty.openpty()
        attributes = termios.tcgetattr(theirs)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        os.write(ours, answers)
        process = subprocess.Popen(
            [sys.executable, world.Programs.path('tarsnap'),
             '--no-default-config', '--keyfile', self.host.keyfile, *args],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=theirs)
        os.close(theirs)
        shown = b''
        with contextlib.suppress(OSError):      # the end, on Linux
            while True:
                data = os.read(ours, 1000)
                if not data:
                    break
                shown += data
        os.close(ours)
        return process.wait(), shown.decode().replace('\r\n', '\n')

    def setUp(self):
        super().setUp()
        for name in ('a', 'b', 'd/f'):
            self.write(name, b'x')

    def test_c(self):
        status, shown = self.terminal(
            b'y\nYes\nn\n\n', '-c', '-w', '--cachedir', self.host.cache,
            '-f', 'x', '-C', self.lab.tree, '.')
        self.assertEqual(status, 0, shown)
        self.assertEqual(shown[shown.index('add'):],
                         "add '.'? add './a'? add './b'? add './d'? ")
        self.assertEqual(self.listed('x'), ['./', './a'])

    def test_x(self):
        self.host.create('all')
        where = self.lab.fresh()
        os.mkdir(where)
        status, shown = self.terminal(b'n\nn\ny\nn\ny\n', '-x', '-w',
                                      '-v', '-f', 'all', '-C', where)
        self.assertEqual(status, 0, shown)
        self.assertEqual(sorted(path for path in lab.snapshot(where)),
                         [b'', b'b', b'd', b'd/f'])
        self.assertIn("extract './a'? extract './b'? x ./b\n", shown)

    def test_the_end_of_answers_ends_the_run(self):
        status, shown = self.terminal(
            b'y\n\x04', '-c', '-w', '--cachedir', self.host.cache, '-f', 'x',
            '-C', self.lab.tree, '.')
        self.assertEqual(status, 1)
        self.assertIn('No more answers\n', shown)
        self.assertIn('Archive does not exist: x', self.host.run(
            '-t', '-f', 'x', cache=False).err)


class FollowTest(Select):

    def test_L_stores_a_link_that_leads_nowhere_as_a_link(self):
        self.write('f', b'text')
        for name, target in (('there', 'f'), ('nowhere', 'gone'),
                             ('around', 'around')):
            os.symlink(target, self.lab.path('tree', name))
        for verbose in ((), ('-vv',)):
            self.members('-L', *verbose, name=str(verbose))
            where = self.host.extract(str(verbose))
            for name, target in (('there', None), ('nowhere', 'gone'),
                                 ('around', 'around')):
                path = os.path.join(where, name)
                self.assertEqual(os.path.islink(path) and os.readlink(path)
                                 or None, target)


class MemoTest(Select):
    """Whatever was asked for before, a run stores what one without a memory
    of earlier runs stores.
    """

    CHOICES = (
        (), ('--newer-mtime', '@1500'), ('--newer-mtime', '@1000'),
        ('--exclude', '[0-4]'), ('--include', '.', '--include', 'd0'),
        ('--exclude-caches',), ('--exclude-if-present', '3'), ('-n',),
        ('-s', '|^./d0|./e|'), ('-s', '/1/x/g'), ('-s', '/5/x/s'),
        ('-s', '/5/yy/s'), ('-L',), ('--no-pad',),
        ('--noatime',),         # --store-atime would tell the runs apart
        ('--snaptime', os.devnull), ('--one-file-system',), ('-l',),
        ('--exclude', 'd1', '-s', '/d2/d1/'), ('--command', 'd0/0=echo 1'))

    def change(self, random):
        """Write or remove a few files."""
        for _ in range(random.randrange(4)):
            name = 'd%d/%d' % (random.randrange(4), random.randrange(12))
            path = self.lab.path('tree', name)
            if random.randrange(4):
                self.write(name, b'%d' % random.randrange(10 ** 6),
                           random.choice((1000, 2000)) * SECOND)
            elif os.path.lexists(path):
                os.unlink(path)

    def tar(self, name):
        result = self.host.run('-r', '-f', name, cache=False)
        self.assertEqual(result.status, 0, result.err)
        return result.out

    def profile(self, *args):
        opt = tarsnap.Parser(['-c', '-f', 'a', *args, 'tree']).parse()
        opt.finish()
        return tarsnap.create_profile(opt)

    def test_what_takes_another_part_has_a_profile_of_its_own(self):
        lists = [self.lab.path('list'), self.lab.path('other')]
        for path in lists:
            with open(path, 'w') as file:
                file.write('a')
        plain = self.profile()
        known = {plain}
        for args in (('--newer', '@5'), ('--exclude', 'x'),
                     ('--include', 'x'), ('-X', lists[0]), ('-n',), ('-L',),
                     ('-H',), ('-P',), ('--nodump',), ('--exclude-caches',),
                     ('--exclude-if-present', 'x'), ('-s', '/x/y/'),
                     ('-T', lists[0]), ('-T', lists[1]),
                     ('--one-file-system',)):
            with self.subTest(args):
                profile = self.profile(*args)
                self.assertNotIn(profile, known)
                known.add(profile)
        listed = self.profile('-T', lists[0])
        with open(lists[0], 'w') as file:
            file.write('b')
        for same, args in ((plain, ('--command', 'x=date')),
                           (plain, ('--noatime',)), (plain, ('-v', '-l')),
                           (self.profile('--newer', '@6'),
                            ('--newer', 'yesterday')),
                           (listed, ('-T', lists[0]))):
            with self.subTest(args):
                self.assertEqual(self.profile(*args), same)

    def test_a_series_of_runs(self):
        import random
        seed = random.randrange(10 ** 6)
        random = random.Random(seed)
        for number in range(48):
            self.write('d%d/%d' % (number % 4, number // 4), b'%d' % number,
                       (1000 + 500 * (number % 3)) * SECOND)
        self.write('d3/CACHEDIR.TAG', SIGNATURE)
        for number in range(4):
            os.symlink('%s%d/5' % ('d' * (number % 2), number),
                       self.lab.path('tree', 'l%d' % number))
        memo = os.path.join(self.host.cache, 'cache')
        with lab.fine():
            for turn in range(10):
                self.change(random)
                args = random.choice(self.CHOICES)
                note = 'seed %d, turn %d: %s' % (seed, turn, ' '.join(args))
                self.members(*args, name='with %d' % turn)
                if '--command' in args:         # of another time each time
                    continue
                os.rename(memo, memo + '.kept')
                self.members(*args, name='without %d' % turn)
                os.rename(memo + '.kept', memo)
                self.assertEqual(self.tar('with %d' % turn),
                                 self.tar('without %d' % turn), note)


class Stale:
    """What lstat gives, with the times of an earlier one."""

    def __init__(self, now, old):
        self.now, self.old = now, old

    def __getattr__(self, name):
        return getattr(self.old if name in ('st_mtime_ns', 'st_ctime_ns')
                       else self.now, name)


def refuse_open(name, flags, dir_fd, real=tarsnap.open_at):
    if os.fsencode(name).endswith(b'unreadable'):
        raise PermissionError(13, os.strerror(13))
    return real(name, flags, dir_fd)


def flag_set(path):
    """Set nodump; False where that cannot be done."""
    if hasattr(os, 'chflags'):
        os.chflags(path, stat.UF_NODUMP)
        return True
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, tarsnap.GET_FLAGS ^ 0xc0000000 ^ 3,
                    struct.pack('l', 0x40))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


if __name__ == '__main__':
    unittest.main()
