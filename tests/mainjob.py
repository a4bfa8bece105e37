# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What a backup is for: the same tests for every kind of server.

A class that takes MainJob in says where the store is (`world_make`) and what
tree to keep (`tree_make`).  Three archives are made once: `first`; `again`,
with nothing changed; `third`, after tree_change().  No test changes them.
"""

import os
import shutil
import subprocess
import tarfile
import time

import world
from world import KIB, MIB


def tree_change(path, seed):
    """Change a tree built by tree_full() or tree_small() in a few places."""
    world.write(os.path.join(path, 'added', 'new'), world.noise(50000, seed))
    world.write(os.path.join(path, 'added', 'grows'), b'as before')
    victim = sorted(name for name in os.listdir(path) if name != 'added')[0]
    shutil.rmtree(os.path.join(path, victim))
    world.write(os.path.join(path, victim), b'a file where a directory was')
    large = os.path.join(path, 'large.changed')
    data = world.noise(MIB, 'large')
    world.write(large, data[:MIB // 2] + b'put in' + data[MIB // 2:])
    for top, _, files in os.walk(path):
        os.utime(top, (10 ** 9, 10 ** 9))
        if files:
            name = os.path.join(top, sorted(files)[-1])
            if not os.path.islink(name):
                os.chmod(name, 0o640)


class MainJob:
    """Mixed into a TestCase; `cls.world` is made by world_make()."""

    @classmethod
    def setUpClass(cls):
        cls.seed = world.seed_choose(cls.__name__)
        cls.world = w = cls.world_make()
        cls.tree = w.path('tree')
        cls.tree_make(cls.tree, cls.seed)
        world.write(os.path.join(cls.tree, 'large.changed'),
                    world.noise(MIB, 'large'))
        cls.before = world.tree_scan(cls.tree)
        w.keygen()
        cls.first = cls.backup('first')
        cls.again = cls.backup('again')
        tree_change(cls.tree, cls.seed)
        cls.after = world.tree_scan(cls.tree)
        cls.third = cls.backup('third')

    @classmethod
    def world_make(cls):
        return world.World(cls, 'dir')

    @classmethod
    def tree_make(cls, path, seed):
        world.tree_full(path, seed)

    @classmethod
    def backup(cls, name, *args, **options):
        return cls.world.ok('-c', '--print-stats', *args, '-f', name, '-C',
                            cls.world.root, 'tree', **options)

    def restored(self):
        """The directory `tree` of `third`, extracted once for all tests."""
        cls = type(self)
        if not hasattr(cls, 'copy'):
            cls.copy = os.path.join(self.world.extract('third'), 'tree')
        return cls.copy

    # Creating.

    def test_statistics_of_the_first(self):
        size = sum({entry.get('names', name): entry.get('size', 0)
                    for name, entry in self.before.items()}.values())
        total = self.first.numbers('This archive')
        self.assertEqual(self.first.numbers('All archives'), total)
        self.assertEqual(self.first.numbers('New data'),
                         self.first.numbers('  (unique data)'))
        # Rows and references come on top, of some hundred bytes each.
        self.assertGreaterEqual(total[0], 0.9 * size)
        self.assertLess(total[0], size + 1000 * len(self.before)
                        + 256 * KIB)
        self.assertLessEqual(self.first.numbers('New data')[0], total[0])

    def test_unchanged_sends_a_record_only(self):
        self.assertEqual(self.again.err.count('\n'), 5, self.again)
        plain, stored = self.again.numbers('New data')
        self.assertGreater(plain, 0)
        self.assertLess(stored, 4 * KIB)
        self.assertEqual(self.again.numbers('This archive')[0],
                         self.first.numbers('This archive')[0])

    def test_changed_sends_what_changed(self):
        plain, stored = self.third.numbers('New data')
        # 50 000 bytes, a chunk or two about the insertion, and pages.
        self.assertGreater(plain, 50000 + 100)
        self.assertLess(plain, 50000 + 3 * 256 * KIB
                        + 400 * len(self.after))
        self.assertEqual(self.third.numbers('All archives')[0], sum(
            done.numbers('This archive')[0]
            for done in (self.first, self.again, self.third)))

    def test_dry_run_with_the_key(self):
        w = self.world
        head = w.ok('--print-head').out
        dry = self.backup('dry', '--dry-run')
        self.assertEqual(w.ok('--print-head').out, head)
        self.assertNotIn('dry', w.names())
        self.assertLess(dry.numbers('New data')[0], 300 * KIB)

    def test_dry_run_without_a_key(self):
        dry = self.world.ok('-c', '--dry-run', '--print-stats', '-C',
                            self.world.root, 'tree', key=None, cache=None)
        size = self.third.numbers('This archive')[0]
        self.assertLess(abs(dry.numbers('This archive')[0] - size),
                        size // 50 + 4 * 256 * KIB)

    # Listing.

    def test_list_archives(self):
        lines = self.world.ok('--list-archives', '-v').out.splitlines()
        self.assertLessEqual({'first', 'again', 'third'},
                             {line.split('\t')[0] for line in lines})
        for line in lines:
            self.assertRegex(line, r'^[^\t]+\t\d{4}-\d\d-\d\d '
                                   r'\d\d:\d\d:\d\d$')
        long = self.world.ok('--list-archives', '-vv').out
        self.assertRegex(long, r'(?m)^again\t.*\t\S*tarsnap\.pyc? .*-c .*'
                               r'-f again -C')

    def test_list_contents(self):
        done = self.world.ok('-t', '-v', '--iso-dates', '--numeric-owner',
                             '-f', 'third')
        lines = done.out.splitlines()
        self.assertEqual(len(lines), len(self.after) + 1)
        entry = self.after[b'added/new']
        self.assertIn('-rw-r-----  0 %-6d %-6d %6d %s tree/added/new' % (
            *entry['owner'], 50000, time.strftime(
                '%Y-%m-%d %H:%M:%S',
                time.gmtime(entry['mtime'] // 10 ** 9))), lines)
        names = self.world.ok('-t', '-f', 'third').out.splitlines()
        self.assertEqual(len(names), len(lines))
        self.assertEqual(names[0], 'tree/')

    # Restoring.

    def test_restore_the_newest(self):
        world.tree_equal(self, self.after, self.restored())

    def test_restore_the_first(self):
        where = self.world.extract('first')
        world.tree_equal(self, self.before, os.path.join(where, 'tree'))

    def test_restore_a_part(self):
        where = self.world.extract('third', 'tree/added', '*/large.c*')
        found = world.tree_scan(os.path.join(where, 'tree'))
        self.assertEqual(set(found), {b'added', b'added/new', b'added/grows',
                                      b'large.changed'})
        world.tree_equal(self, {name: self.after[name] for name in found},
                         found)

    def test_rsync_finds_no_difference(self):
        if not shutil.which('rsync'):
            self.skipTest('rsync is missing')
        done = self.world.run(
            ['rsync', '-anciXAH', '--delete', self.tree + '/',
             self.restored() + '/'])
        self.assertEqual((done.code, done.out, done.err), (0, '', ''))

    def test_tar_finds_no_difference(self):
        self.tar_needed()
        stream = self.world.path('made.tar')
        subprocess.check_call(['tar', '-cf', stream, '-C', self.world.root,
                               'tree'])
        done = self.world.run(['tar', '-df', stream, '-C',
                               os.path.dirname(self.restored())])
        os.unlink(stream)
        self.assertEqual((done.code, done.out, done.err), (0, '', ''))

    def test_tar_reads_the_stream(self):
        self.tar_needed()
        stream = self.world.path('stream.tar')
        with open(stream, 'wb') as file:
            self.assertEqual(subprocess.call(
                self.world.argv(['-r', '-f', 'third']), stdout=file,
                env=self.world.environment), 0)
        done = self.world.run(['tar', '-df', stream, '-C', self.world.root])
        # That is how pax marks a name that is not UTF-8.
        said = set(done.lines) - {'tar: Ignoring unknown extended header '
                                  "keyword 'hdrcharset'"}
        self.assertEqual((done.code, done.out, said), (0, '', set()))
        with tarfile.open(stream) as file:
            self.assertEqual(len(file.getnames()), len(self.after) + 1)
        os.unlink(stream)

    def tar_needed(self):
        if not shutil.which('tar') or b'GNU' not in subprocess.run(
                ['tar', '--version'], stdout=subprocess.PIPE).stdout:
            self.skipTest('GNU tar is missing')

    # The cache directory, and deleting.

    def test_a_lost_cache_is_rebuilt(self):
        w, cache = self.world, self.world.path('lost')
        done = w.tarsnap('-c', '-f', 'refused', '-C', w.root, 'tree',
                         cache=cache)
        self.assertEqual(done.code, 1)
        self.assertIn('tarsnap: Sequence number mismatch: Run --fsck',
                      done.err)
        self.assertNotIn('refused', w.names())
        done = w.ok('--fsck', cache=cache)
        for number in range(1, 6):
            self.assertRegex(done.out, r'(?m)^Phase %d: ' % number)
        self.assertEqual(w.ok('--print-stats', cache=cache).out,
                         w.ok('--print-stats').out)
        self.assertEqual(
            w.ok('--print-stats', '-f', 'third', cache=cache).out,
            w.ok('--print-stats', '-f', 'third').out)
        done = self.backup('after fsck', cache=cache)
        self.assertLess(done.numbers('New data')[1], 100 * KIB)
        world.tree_equal(self, self.after, os.path.join(
            w.extract('after fsck', cache=cache), 'tree'))
        w.ok('-d', '-f', 'after fsck', cache=cache)
        w.ok('-d', '-f', 'no such', '--keep-going')     # catches up

    def test_delete(self):
        w = self.world
        before = w.ok('--print-stats').numbers('All archives')
        world.write(w.path('alone'), world.noise(300000, 'alone'))
        w.ok('-c', '-f', 'doomed', '-C', w.root, 'alone', 'tree')
        done = w.ok('-d', '-v', '--print-stats', '-f', 'doomed')
        self.assertIn('Deleting archive "doomed"\n', done.err)
        plain, stored = done.numbers('Deleted data')
        self.assertGreaterEqual(plain, 300000)
        self.assertLess(plain, 300000 + 500 * KIB)
        self.assertEqual(done.numbers('All archives'), before)
        self.assertNotIn('doomed', w.names())
        done = w.tarsnap('-x', '-f', 'doomed', '-C', w.root)
        self.assertEqual(done.code, 1)
        self.assertIn('tarsnap: Archive does not exist: doomed\n', done.err)
        world.tree_equal(self, self.before, os.path.join(
            w.extract('again'), 'tree'))
