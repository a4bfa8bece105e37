# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""-d, --keep-going, --nuke, --recover, --initialize-cachedir: what they say,
to the byte, and what is left.

Real commands on stores in directories.  A test that changes what is stored
works on a copy of a world made once.
"""

import csv
import json
import os
import re
import shutil
import stat
import unittest

import world

HEAD = ' ' * 39 + 'Total size  Compressed size\n'
FAILED = 'tarsnap: Error deleting archive'
DELAYED = 'tarsnap: Error exit delayed from previous errors.'
CHANGED = 'tarsnap: The server has changed what it stores nevertheless.'


class DeleteCase(unittest.TestCase):
    """A world with the archives a, b, c; each has data of its own."""

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'dir')
        w.keygen()
        for name in 'abc':
            world.write(w.path('tree', name), world.noise(60000, name))
            w.ok('-c', '-f', name, '-C', w.root, 'tree')
        for name in ('store', 'cache'):
            shutil.copytree(w.path(name), w.path(name + '.whole'),
                            symlinks=True)

    def setUp(self):
        w = self.world
        for name in ('store', 'cache'):
            shutil.rmtree(w.path(name))
            shutil.copytree(w.path(name + '.whole'), w.path(name),
                            symlinks=True)

    def check(self, done, code, *lines):
        """Exit status, and all of stderr."""
        self.assertEqual((done.code, done.lines), (code, list(lines)), done)

    def left(self, names):
        self.assertEqual(self.world.names(), sorted(names))


class Delete(DeleteCase):

    def test_silent(self):
        """3.11: success is silent"""
        for args in (['-d', '-f', 'a'], ['-d', '-f', 'b', '-f', 'c']):
            done = self.world.ok(*args)
            self.assertEqual((done.out, done.err), ('', ''))
        self.left([])

    def test_table(self):
        """3.1: one archive is `This archive`"""
        w = self.world
        before = w.ok('--print-stats').numbers('All archives')
        own = w.ok('--print-stats', '-f', 'a').out.splitlines()[3:]
        done = w.ok('-d', '--print-stats', '-f', 'a')
        self.assertEqual(done.out, '')
        rows = [re.sub(r'\s+\d+\s+\d+$', '', line) for line in done.lines[1:]]
        self.assertEqual(done.lines[0] + '\n', HEAD)
        self.assertEqual(rows, ['All archives', '  (unique data)',
                                'This archive', 'Deleted data'])
        self.assertEqual(done.numbers('This archive'),
                         tuple(map(int, own[0].split()[-2:])))
        self.assertEqual(done.numbers('Deleted data'),
                         tuple(map(int, own[1].split()[-2:])))
        after = done.numbers('All archives')
        self.assertEqual(after[0],
                         before[0] - done.numbers('This archive')[0])
        self.assertEqual(w.ok('--print-stats').out,
                         '\n'.join(done.lines[:3]) + '\n')

    def test_tables(self):
        """3.1: of several, each block names its archive"""
        done = self.world.ok('-d', '-v', '--print-stats', '-f', 'c', '-f',
                             'a')
        self.assertEqual(len(done.lines), 12)
        for at, name in ((0, 'c'), (6, 'a')):
            block = done.lines[at:at + 6]
            self.assertEqual(block[0], 'Deleting archive "%s"' % name)
            self.assertEqual(block[1] + '\n', HEAD)
            self.assertEqual(block[4][:33], name + ' ' * 32)
            self.assertTrue(block[5].startswith('Deleted data  '))

    def test_last_one(self):
        """6.13: upstream's test 04 looks at field 3 of All archives"""
        done = self.world.ok('-d', '--print-stats', '-f', 'a', '-f', 'b',
                             '-f', 'c')
        self.assertEqual([line.split()[2] for line in done.lines if
                          line.startswith('All archives')][-1], '0')
        self.assertEqual(done.lines[-3].split()[-2:], ['0', '0'])

    def test_gui(self):
        """6.3: the last five lines"""
        done = self.world.ok('--print-stats', '-d', '-f', 'a', '-f', 'b')
        self.assertEqual(done.lines[-5] + '\n', HEAD)
        self.assertRegex(done.lines[-4], r'^All archives\s+\d+\s+\d+$')
        self.assertRegex(done.lines[-1], r'^Deleted data\s+\d+\s+\d+$')

    def test_csv(self):
        """3.2: of several only the last is left; nothing on stderr"""
        w, path = self.world, self.world.path('csv')
        done = w.ok('-d', '--print-stats', '--csv-file', path, '-f', 'a',
                    '-f', 'b')
        self.assertEqual(done.err, '')
        with open(path, newline='') as file:
            rows = list(csv.reader(file))
        self.assertEqual([row[0] for row in rows], [
            'Archive name', 'All archives', '  (unique data)', 'b',
            'Deleted data'])

    def test_json(self):
        done = self.world.ok('-d', '--json', '--print-stats', '-f', 'c')
        self.assertEqual(done.err, '')
        first, second = map(json.loads, done.out.splitlines())
        self.assertEqual((first['type'], first['archives']),
                         ('statistics', 2))
        self.assertEqual(second['name'], 'c')
        self.assertGreater(second['deleted_total'], 60000)

    def test_directive(self):
        """2.3: print-stats in a configuration file"""
        w = self.world
        world.write(w.path('conf'), b'print-stats\nhumanize-numbers\n')
        done = w.ok('--configfile', w.path('conf'), '-d', '-f', 'c')
        self.assertRegex(done.err, r'(?m)^Deleted data +\d+ kB +\d+ kB$')
        done = w.ok('--configfile', w.path('conf'), '--list-archives')
        self.assertEqual(done.err, '')


class Missing(DeleteCase):
    """5.8, 3.12"""

    def test_alone(self):
        self.check(self.world.tarsnap('-d', '-f', 'no'), 1,
                   'tarsnap: Archive does not exist: no', FAILED, DELAYED)
        self.left('abc')

    def test_first(self):
        """nothing was changed"""
        self.check(self.world.tarsnap('-d', '-f', 'no', '-f', 'a'), 1,
                   'tarsnap: Archive does not exist: no', FAILED, DELAYED)
        self.left('abc')

    def test_after_another(self):
        """earlier ones stay deleted: 2"""
        self.check(self.world.tarsnap('-d', '-f', 'a', '-f', 'no', '-f',
                                      'b'), 2,
                   'tarsnap: Archive does not exist: no', FAILED, DELAYED,
                   CHANGED)
        self.left('bc')

    def test_twice(self):
        self.assertEqual(self.world.tarsnap('-d', '-f', 'a', '-f', 'a').code,
                         2)

    def test_keep_going(self):
        self.check(self.world.tarsnap('-d', '--keep-going', '-f', 'no', '-f',
                                      'a', '-f', 'nor this'), 0,
                   'tarsnap: Archive does not exist: no',
                   'tarsnap: Archive does not exist: nor this')
        self.left('bc')

    def test_keep_going_is_for_missing_ones_only(self):
        w = self.world
        os.rename(w.path('store'), w.path('store.away'))
        try:
            done = w.tarsnap('-d', '--keep-going', '-f', 'a')
        finally:
            os.rename(w.path('store.away'), w.path('store'))
        self.assertEqual(done.code, 1)
        self.left('abc')

    def test_no_name(self):
        w = self.world
        world.write(w.path('none'), b'\n\n')
        for args in ([], ['--archive-names', w.path('none')]):
            done = w.tarsnap('-d', *args)
            self.assertEqual(done.code, 1)
            self.assertIn('Archive name must be specified', done.lines[0])

    def test_forgotten_f(self):
        """1.2: operands are refused"""
        self.assertEqual(self.world.tarsnap('-d', '-f', 'a', 'b').code, 1)
        self.left('abc')


class Wrappers(DeleteCase):

    def test_prune_by_list(self):
        """6.6, 6.8, 6.9, 6.11: names in, exit status out"""
        w = self.world
        w.ok('-d', '--archive-names', '-', '--print-stats',
             '--humanize-numbers', give=b'a\nb\n')
        self.left('c')

    def test_old_archives(self):
        """6.7: stderr tells what was gone already"""
        done = self.world.tarsnap('-d', '-f', 'a', '-f', 'gone')
        self.assertNotEqual(done.code, 0)
        self.assertIn('Archive does not exist', done.err)
        lines = self.world.ok('--list-archives', '-v').out.splitlines()
        for line in lines:
            self.assertRegex(line, r'^\w+\t\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$')

    def test_pruner(self):
        """6.9: options before and after the mode; 6.11: -df, -fNAME"""
        w = self.world
        for words in (['-d', '--keyfile', w.key, '--cachedir',
                       w.path('cache'), '-f', 'a'],
                      ['-d', '-fb', '--keyfile', w.key, '--cachedir',
                       w.path('cache')],
                      ['--quiet', '--no-print-stats', '--keyfile', w.key,
                       '--cachedir', w.path('cache'), '-df', 'c']):
            done = w.run(w.argv(words, key=None, cache=None))
            self.assertEqual((done.code, done.out, done.err), (0, '', ''))
        self.left([])


class Nuke(DeleteCase):
    """3.10, 5.8"""

    def test_right_answer(self):
        w = self.world
        done = w.tarsnap('--nuke', cache=None, give=b'No Tomorrow\n')
        self.assertEqual((done.code, done.out), (0, ''))
        self.assertIn('No Tomorrow', done.err)
        self.left([])
        # The cache directory notices by itself.
        w.ok('-c', '-f', 'new', '-C', w.root, 'tree')
        self.left(['new'])
        world.tree_equal(self, w.path('tree'), os.path.join(
            w.extract('new'), 'tree'))

    def test_gui(self):
        """6.3: the GUI gives a cache directory"""
        done = self.world.tarsnap('--nuke', give=b'No Tomorrow\n')
        self.assertEqual(done.code, 0)
        self.left([])

    def test_other_answers(self):
        for answer in (b'', b'No Tomorrow', b'no tomorrow\n', b'yes\n',
                       b' No Tomorrow\n', b'No Tomorrow \n', b'\xff\xfe\n',
                       b'No Tomorrow\r\n', b'\nNo Tomorrow\n'):
            with self.subTest(answer):
                done = self.world.tarsnap('--nuke', give=answer)
                self.assertEqual((done.code, done.out), (1, ''))
                self.assertNotIn('Traceback', done.err)
                self.assertEqual(done.lines[-2:], [
                    'tarsnap: Error nuking archives', DELAYED])
        self.left('abc')

    def test_stdin_closed(self):
        w = self.world
        done = w.run(['sh', '-c', '"$@" <&-', 'sh'] + w.argv(['--nuke']))
        self.assertEqual(done.code, 1)
        self.assertNotIn('Traceback', done.err)
        self.left('abc')

    def test_names_are_refused(self):
        done = self.world.tarsnap('--nuke', '-f', 'a', give=b'No Tomorrow\n')
        self.assertEqual(done.code, 1)
        self.left('abc')


class Cachedir(DeleteCase):

    def test_initialize(self):
        """3.10: one line and mode 0700 for each level; 6.13: test 04"""
        w = self.world
        path = w.path('new', 'deep', 'er')
        done = w.run(w.argv(['--cachedir', path, '--initialize-cachedir'],
                            cache=None))
        self.assertEqual((done.code, done.out), (0, ''))
        levels = [w.path('new'), w.path('new', 'deep'), path]
        self.assertEqual(done.lines, [
            'Directory %s created for "--cachedir %s"' % (level, path)
            for level in levels])
        for level in levels:
            self.assertEqual(stat.S_IMODE(os.stat(level).st_mode), 0o700)
        w.ok('--fsck', cache=path)
        w.ok('-c', '-f', 'x', '-C', w.root, 'tree', cache=path)

    def test_initialize_what_is_used(self):
        w = self.world
        before = w.ok('--print-stats').out
        done = w.tarsnap('--initialize-cachedir')
        self.assertEqual(done.code, 1)
        self.assertIn(w.path('cache'), done.lines[0])
        self.assertEqual(w.ok('--print-stats').out, before)

    def test_any_key_initializes(self):
        w = self.world
        for role in ('-r', '-w', '--prune', '--nuke'):
            key = w.subset('init' + role, role)
            w.ok('--initialize-cachedir', key=key, cache=w.path('i' + role))

    def test_recover_nothing(self):
        """5.8: silent"""
        w = self.world
        for role in ('-w', '--prune', '--nuke'):
            key = w.subset('recover' + role, role)
            done = w.ok('--recover', key=key)
            self.assertEqual((done.out, done.err), ('', ''))
        done = w.tarsnap('--recover', key=w.subset('recover-r', '-r'))
        self.assertEqual(done.code, 1)

    def test_recover_a_name(self):
        self.assertEqual(self.world.tarsnap('--recover', '-f', 'a').code, 1)

    def test_without_state(self):
        """1.2: says --fsck"""
        w = self.world
        for args in (['-d', '-f', 'a'], ['--print-stats'], ['--recover']):
            done = w.tarsnap(*args, cache=w.path('blank'))
            self.assertEqual(done.code, 1)
            self.assertIn('--fsck', done.lines[0])
        self.left('abc')


if __name__ == '__main__':
    unittest.main()
