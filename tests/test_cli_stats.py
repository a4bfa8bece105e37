# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--print-stats, --csv-file and what programs parse of them, to the byte.

Real commands on a store in a directory.  Two archives are made once; no test
changes what is stored.
"""

import csv
import json
import os
import re
import unittest

import tarsnap
import world

HEAD = ' ' * 39 + 'Total size  Compressed size\n'
ROW = '%-32s  %15s  %15s\n'
LONG = 'long-%s' % ('n' * 40)


class StatsCase(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'dir')
        w.keygen()
        world.tree_small(w.path('tree'), 'stats', 10)
        cls.made = w.ok('-c', '--print-stats', '-f', 'one', '-C', w.root,
                        'tree')
        world.write(w.path('tree', 'more'), world.noise(50000, 'more'))
        w.ok('-c', '-f', LONG, '--creationtime', '86400', '-C', w.root,
             'tree')

    def stats(self, *args, **options):
        done = self.world.ok('--print-stats', *args, **options)
        self.assertEqual(done.err, '')
        return done.out

    def pairs(self, *args):
        """[(name, total, compressed)] of a table."""
        return [(found[1].rstrip(), int(found[2]), int(found[3])) for found in
                re.finditer(r'(?m)^(.{32,}?)  +(\d+) +(\d+)$',
                            self.stats(*args))]


class Table(StatsCase):
    """Contract 3.1."""

    def test_global(self):
        rows = self.pairs()
        self.assertEqual(self.stats(), HEAD + ''.join(
            ROW % row for row in rows))
        self.assertEqual([row[0] for row in rows],
                         ['All archives', '  (unique data)'])
        self.assertGreater(rows[0][1], rows[1][1])
        self.assertEqual({len(line) for line in self.stats().splitlines()},
                         {66})

    def test_one_many_all(self):
        everything = self.stats('-f', '*')
        one, both = self.stats('-f', 'one'), self.stats('-f', LONG, '-f',
                                                        'one')
        self.assertEqual(everything, both)      # the oldest first
        self.assertEqual(everything, self.stats('-f', '*', '-f', 'ignored'))
        lines = both.splitlines()
        self.assertEqual(len(lines), 7)
        self.assertEqual(one.splitlines(), lines[:3] + lines[5:])
        self.assertTrue(lines[3].startswith(LONG + '  '), lines[3])
        self.assertTrue(lines[5].startswith('one' + ' ' * 31), lines[5])
        for line in (lines[4], lines[6]):
            self.assertRegex(line, r'^  \(unique data\) {17}  {1,15}\d+ +\d+$')
        rows = self.pairs('-f', '*')
        self.assertEqual(rows[0][1:], (rows[2][1] + rows[4][1],
                                       rows[2][2] + rows[4][2]))

    def test_missing(self):
        for args, status, rows in (
                (['-f', 'no', '-f', 'one'], 1, 3),
                (['-f', 'one', '-f', 'no'], 1, 5),
                (['--keep-going', '-f', 'no', '-f', 'one'], 0, 5)):
            with self.subTest(args):
                done = self.world.tarsnap('--print-stats', *args)
                self.assertEqual(done.code, status)
                self.assertEqual(len(done.out.splitlines()), rows)
                self.assertEqual(done.lines[0],
                                 'tarsnap: Archive does not exist: no')

    def test_create_on_stderr(self):
        made = self.made
        self.assertEqual(made.out, '')
        names = [line[:32].rstrip() for line in made.lines]
        self.assertEqual(names, ['', 'All archives', '  (unique data)',
                                 'This archive', 'New data'])
        self.assertEqual(made.lines[0] + '\n', HEAD)
        self.assertEqual(made.numbers('All archives'),
                         made.numbers('This archive'))

    def test_no_then_yes(self):
        """1.1 #16: asking for statistics beats asking for none."""
        self.assertEqual(self.stats(), self.stats('--no-print-stats'))

    def test_from_the_cache_alone(self):
        w = self.world
        os.rename(w.address, w.address + '.away')
        try:
            self.assertIn('All archives', self.stats())
            self.assertIn('\none', self.stats('-f', 'one'))
            done = w.tarsnap('--print-stats', '-f', '*')
            self.assertEqual(done.code, 1)
        finally:
            os.rename(w.address + '.away', w.address)

    def test_names_of_any_bytes(self):
        """Also in a locale that knows ASCII only."""
        w = self.world
        name, cache = 'n\udcff\xfcme', w.path('odd.cache')
        key = w.keygen('odd')
        env = dict(w.environment, LC_ALL='C')
        w.ok('-c', '-f', name, '-C', w.root, 'logs', key=key, cache=cache,
             env=env)
        for args in (['-f', name], ['-f', '*']):
            done = w.ok('--print-stats', *args, key=key, cache=cache, env=env)
            self.assertEqual(done.raw.splitlines()[3][:7],
                             b'n\xff\xc3\xbcme ')

    def test_roles(self):
        w = self.world
        keys = [w.subset('stats' + role, role) for role in
                ('-w', '--nuke', '-r', '--prune')]
        for key in keys:
            self.assertEqual(self.stats(key=key), self.stats())
        for key in keys[:2]:
            done = w.tarsnap('--print-stats', '-f', 'one', key=key)
            self.assertEqual(done.code, 1)
            self.assertIn('read authorization', done.err)
        for key in keys[2:]:
            for name in ('one', '*'):
                self.assertEqual(self.stats('-f', name, key=key),
                                 self.stats('-f', name))

    def test_stdout_closed(self):
        done = self.world.run(['sh', '-c', '"$@" >&-', 'sh'] +
                              self.world.argv(['--print-stats']))
        self.assertNotIn('Traceback', done.err)


class Humanized(unittest.TestCase):
    """Contract 3.1: truncated, never rounded."""

    def test_numbers(self):
        for number, text in (
                (0, '0 B'), (999, '999 B'), (1000, '1.0 kB'),
                (1999, '1.9 kB'), (9999, '9.9 kB'), (10000, '10 kB'),
                (99999, '99 kB'), (999999, '999 kB'), (1000000, '1.0 MB'),
                (9960000, '9.9 MB'), (123456789, '123 MB'),
                (10 ** 9, '1.0 GB'), (10 ** 12 - 1, '999 GB'),
                (10 ** 15, '1.0 PB'), ((1 << 64) - 1, '18 EB')):
            with self.subTest(number):
                self.assertEqual(tarsnap.humanize(number), text)


class Csv(StatsCase):
    """Contract 3.2."""

    def setUp(self):
        self.file = self.world.path('stats.csv')
        world.write(self.file, b'what stood there before\n' * 100)

    def rows(self):
        with open(self.file, newline='') as file:
            return list(csv.reader(file))

    def test_print_stats(self):
        for names in ([], ['one'], ['one', LONG], ['*']):
            with self.subTest(names):
                args = [word for name in names for word in ('-f', name)]
                self.assertEqual(
                    self.stats('--csv-file', self.file, *args), '')
                rows = self.rows()
                self.assertEqual(','.join(rows.pop(0)),
                                 'Archive name,Total size,Compressed size')
                self.assertEqual([(name, int(total), int(stored))
                                  for name, total, stored in rows],
                                 self.pairs(*args))

    def test_created_anew(self):
        os.unlink(self.file)
        self.stats('--csv-file', self.file)
        self.assertEqual(len(self.rows()), 3)

    def test_humanized(self):
        self.stats('--csv-file', self.file, '--humanize-numbers')
        self.assertRegex(self.rows()[1][1], r'^[0-9.]+ [kM]?B$')

    def test_create(self):
        w = self.world
        done = w.ok('-c', '--dry-run', '--print-stats', '--csv-file',
                    self.file, '-C', w.root, 'tree')
        self.assertEqual((done.out, done.err), ('', ''))
        self.assertEqual([row[0] for row in self.rows()[1:]],
                         ['All archives', '  (unique data)', 'This archive',
                          'New data'])

    def test_without_print_stats(self):
        """The file is not touched."""
        w, before = self.world, os.stat(self.file)
        w.ok('-c', '--dry-run', '--csv-file', self.file, '-C', w.root, 'tree')
        after = os.stat(self.file)
        self.assertEqual((before.st_size, before.st_mtime_ns),
                         (after.st_size, after.st_mtime_ns))

    def test_cannot_be_written(self):
        """Known before the work: nothing is stored."""
        w = self.world
        names = w.names()
        for where in (w.path('nowhere', 'file'), w.root):
            with self.subTest(where):
                done = w.tarsnap('-c', '--print-stats', '--csv-file', where,
                                 '-f', 'not', '-C', w.root, 'tree')
                self.assertEqual(done.code, 1)
                self.assertIn('Cannot write --csv-file %s' % where,
                              done.lines[0])
        self.assertEqual(w.names(), names)

    def test_once(self):
        done = self.world.tarsnap('--print-stats', '--csv-file', 'a',
                                  '--csv-file', 'b')
        self.assertEqual(done.code, 1)
        self.assertIn('--csv-file', done.lines[0])
        self.assertIn('usage', done.err)

    def test_other_modes_ignore_it(self):
        where = self.world.path('ignored.csv')
        self.world.ok('--list-archives', '--csv-file', where)
        self.assertFalse(os.path.exists(where))


class Nul(StatsCase):
    """Contract 3.5: two NULs between fields, one at the end, no padding."""

    def test_records(self):
        done = self.world.ok('--print-stats', '--null-output', '-f', 'one')
        table = self.pairs('-f', 'one')
        self.assertEqual(done.out, '\0\0Total size\0\0Compressed size\0'
                         + ''.join('%s\0\0%d\0\0%d\0' % row for row in table))


class Json(StatsCase):

    def test_keys(self):
        rows = self.pairs('-f', '*')
        objects = [json.loads(line) for line in
                   self.stats('--json', '-f', '*').splitlines()]
        self.assertEqual(objects[0], {
            'type': 'statistics', 'archives': 2,
            'total': rows[0][1], 'compressed': rows[0][2],
            'unique_total': rows[1][1], 'unique_compressed': rows[1][2]})
        self.assertEqual(objects[1:], [{
            'type': 'archive_statistics', 'name': whole[0],
            'total': whole[1], 'compressed': whole[2],
            'unique_total': own[1], 'unique_compressed': own[2]}
            for whole, own in (rows[2:4], rows[4:6])])

    def test_create(self):
        w = self.world
        done = w.ok('-c', '--dry-run', '--json', '--print-stats', '-f', 'x',
                    '-C', w.root, 'tree')
        self.assertEqual(done.err, '')
        first, second = map(json.loads, done.out.splitlines())
        self.assertEqual(first['archives'], 3)
        self.assertEqual(second['name'], 'x')
        self.assertIn('new_compressed', second)


class Parsers(StatsCase):
    """What wrappers match."""

    def test_gui_overall(self):
        """6.3"""
        lines = self.stats('--no-humanize-numbers').splitlines()
        self.assertGreaterEqual(len(lines), 3)
        self.assertRegex(lines[1], r'^All archives\s+(\d+)\s+(\d+)$')
        self.assertRegex(lines[2], r'^\s+\(unique data\)\s+(\d+)\s+(\d+)$')

    def test_gui_archive(self):
        """6.3"""
        lines = self.stats('--no-humanize-numbers', '-f', 'one').splitlines()
        self.assertGreaterEqual(len([line for line in lines if line]), 5)
        self.assertTrue(any(re.match(r'^one\s+(\d+)\s+(\d+)$', line)
                            for line in lines))
        self.assertRegex(lines[-1], r'^\s+\(unique data\)\s+(\d+)\s+(\d+)$')

    def test_gui_create(self):
        """6.3, and the Go tool of 6.11"""
        self.assertRegex(self.made.err,
                         r'(?m)^This archive\s+(\d+)\s+(\d+)$')
        self.assertRegex(self.made.err, r'(?m)^New data\s+(\d+)\s+(\d+)$')
        self.assertGreaterEqual(len(self.made.lines), 5)

    def test_creachadair(self):
        """6.4: --no-print-stats stands before --print-stats"""
        done = self.world.ok('--quiet', '--no-print-stats', '--print-stats',
                             '--no-humanize-numbers', '-f', 'one', '-f', LONG)
        found = [re.match(r'^\s*(.*?)\s+(\d+)\s+(\d+)$', line)
                 for line in done.out.splitlines()[1:]]
        self.assertEqual([match[1] for match in found], [
            'All archives', '(unique data)', 'one', '(unique data)', LONG,
            '(unique data)'])

    def test_zabbix(self):
        """6.10: exactly three rows of three fields, numbers plain"""
        file = self.world.path('zabbix')
        world.write(file)
        self.stats('--csv-file', file)
        with open(file) as lines:
            rows = [line.rstrip('\n').split(',') for line in lines]
        self.assertEqual([row[0] for row in rows], [
            'Archive name', 'All archives', '  (unique data)'])
        for row in rows[1:]:
            self.assertEqual(len(row), 3)
            self.assertTrue(row[1].isdigit() and row[2].isdigit(), row)

    def test_deuza(self):
        """6.11: awk takes the last two fields"""
        for line in self.stats().splitlines()[1:]:
            self.assertTrue(all(word.isdigit() for word in
                                line.split()[-2:]), line)

    def test_upstream_04(self):
        """6.13: awk field 3 of All archives"""
        line = self.stats().splitlines()[1]
        self.assertGreater(int(line.split()[2]), 0)


class WithoutKey(unittest.TestCase):

    def test_upstream_02(self):
        """6.13: -c --dry-run, and with --print-stats, with no key"""
        w = world.World(self, 'dir')
        world.write(w.path('file'), b'content')
        for more, lines in (([], 0), (['--print-stats'], 5)):
            done = w.run(w.argv(['-c', '--dry-run', *more, w.path('file')],
                                cache=None, key=None))
            self.assertEqual(done.code, 0, done)
            self.assertEqual(done.out, '')
            rows = [line for line in done.lines
                    if not line.startswith('tarsnap: ')]
            self.assertEqual(len(rows), lines, done)


if __name__ == '__main__':
    unittest.main()
