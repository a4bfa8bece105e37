# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What is stored already is not sent again.

Counted in frames on the wire: names, classes and lengths of the blocks that a
run puts.
"""

import collections
import os
import random
import shutil
import unittest
from unittest import mock

import lab
import tarsnap
from lab import ROOT, LabTest, snapshot

SEED = int(os.environ.get('SEED', random.SystemRandom().randrange(10 ** 6)))
MB = 10 ** 6


def setUpModule():
    print('SEED=%d' % SEED)


class DedupTest(LabTest):
    def setUp(self):
        super().setUp()
        self.rng = random.Random('%s-%d' % (self.id(), SEED))
        self.runs = 0

    def sent(self, *args, host=None):
        """Store the tree; the Log of what that sent."""
        self.runs += 1
        with lab.tapped() as log:
            (host or self.host).create('run-%d' % self.runs, *args)
        return log

    def chunks(self, log):
        return len(log.puts(b'c'))

    def bytes(self, log, *classes):
        return sum(row[2] for cls in classes or b'cia'
                   for row in log.puts(cls if isinstance(cls, bytes)
                                       else bytes([cls])))

    def smalls(self, count, top='d', low=10, high=3000):
        """Make `count` small files of different content."""
        for number in range(count):
            self.write('%s/f%04d' % (top, number), self.rng.randbytes(
                self.rng.randrange(low, high)))

    def last_is_the_tree(self):
        self.host.check('run-%d' % self.runs, snapshot(self.lab.tree))

    def where(self, *parts):
        return os.path.join(self.lab.tree, *parts)


class SmallFiles(DedupTest):
    """Files that have no chunk of their own."""

    def setUp(self):
        super().setUp()
        self.smalls(300)
        self.write('d/large', self.rng.randbytes(400000))
        self.assertGreater(self.chunks(self.sent()), 3)

    def test_unchanged(self):
        log = self.sent()
        self.assertEqual([row[1] for row in log.puts()], [b'a'])

    def test_touched(self):
        for number in range(0, 300, 3):
            os.utime(self.where('d/f%04d' % number), ns=(1, number))
        os.utime(self.where('d/large'), ns=(1, 1))
        self.assertEqual(self.chunks(self.sent()), 0)
        self.last_is_the_tree()

    def test_modes_changed(self):
        for number in range(0, 300, 3):
            os.chmod(self.where('d/f%04d' % number), 0o600 + number % 8)
        self.assertEqual(self.chunks(self.sent()), 0)
        self.last_is_the_tree()

    def test_directory_renamed(self):
        os.rename(self.where('d'), self.where('another'))
        self.assertEqual(self.chunks(self.sent()), 0)
        self.last_is_the_tree()

    def test_copied(self):
        shutil.copytree(self.where('d'), self.where('copy'))
        self.assertEqual(self.chunks(self.sent()), 0)
        self.last_is_the_tree()

    def test_without_the_digest_they_are_sent_again(self):
        for number in range(0, 300, 3):
            os.utime(self.where('d/f%04d' % number), ns=(1, number))
        with mock.patch.object(tarsnap.Writer, 'small_find',
                               lambda writer, digest: None):
            self.assertGreater(self.chunks(self.sent()), 0)

    def test_memo_lost(self):
        """What was in `cache` is read again and found by its digest."""
        self.host.lose('cache')
        self.assertEqual(self.chunks(self.sent()), 0)
        self.last_is_the_tree()

    def test_everything_lost(self):
        """After --fsck the large files are found by name; small ones are cut
        as before, as they were one stream before.
        """
        self.host.lose('cache', 'directory')
        self.host.good('--fsck')
        log = self.sent()
        self.assertEqual(self.chunks(log), 0)
        self.last_is_the_tree()

    def test_changed_then_everything_lost(self):
        """Once the stream was cut in pieces it cannot be had again from the
        names alone; at most the small files are sent again, once.
        """
        for number in range(0, 300, 50):
            self.write('d/f%04d' % number, self.rng.randbytes(1000))
        self.sent()
        small = sum(os.path.getsize(self.where('d/f%04d' % number))
                    for number in range(300))
        self.host.lose('cache', 'directory')
        self.host.good('--fsck')
        log = self.sent()
        self.assertLess(self.bytes(log, b'c'), small * 1.1)
        self.assertEqual(self.chunks(self.sent()), 0)
        self.last_is_the_tree()


class Identical(DedupTest):
    def test_identical_small_files_once(self):
        data = self.rng.randbytes(20000)
        for number in range(100):
            self.write('d/f%d' % number, data)
        log = self.sent()
        self.assertLess(self.bytes(log, b'c'), 25000)
        self.last_is_the_tree()

    def test_identical_large_files_once(self):
        data = self.rng.randbytes(3000000)
        for name in 'abc':
            self.write(name, data)
        log = self.sent()
        self.assertLess(self.bytes(log, b'c'), 3300000)
        names = [row[0] for row in log.puts()]
        self.assertEqual(len(names), len(set(names)))
        self.last_is_the_tree()

    def test_never_a_name_twice(self):
        """Two threads meet the same new chunk."""
        piece = self.rng.randbytes(200000)
        for number in range(60):
            self.write('f%d' % number, piece)
        log = self.sent()
        self.assertEqual(self.chunks(log), 1)


class Profiles(DedupTest):
    """Two jobs over one tree do not overwrite each other's rows."""

    def test_alternating(self):
        self.smalls(50, 'etc')
        self.smalls(50, 'home')
        jobs = (('etc',), ('.',), ('--exclude=*9', '.'))
        read = []
        for turn in range(4):
            for job in jobs:
                with mock.patch.object(
                        tarsnap.FileReader, 'read', autospec=True,
                        side_effect=tarsnap.FileReader.read) as reader:
                    log = self.sent(*job)
                read.append(reader.call_count)
                if turn:
                    self.assertEqual(self.bytes(log, b'c', b'i'), 0)
        self.assertEqual(read[3:], [0] * 9)

    def test_one_changes_what_the_other_reads(self):
        self.smalls(50, 'etc')
        self.smalls(50, 'home')
        for job in (('etc',), ('.',)):
            self.sent(*job)
        self.write('etc/f0001', b'new')
        self.assertEqual(self.chunks(self.sent('etc')), 1)
        self.assertEqual(self.chunks(self.sent('.')), 0)
        self.last_is_the_tree()

    def test_profile_not_used_for_long_goes(self):
        self.smalls(5)
        self.sent('d')
        with mock.patch.object(tarsnap, 'PROFILE_RUNS', 2):
            for _ in range(4):
                self.sent()
        with self.host.database('cache') as db:
            rows = db.execute('SELECT DISTINCT profile FROM memo').fetchall()
        self.assertEqual(len(rows), 1)


class Repacking(DedupTest):
    """A shared chunk less than half used is packed anew."""

    def shared(self):
        """chunk -> (plain length, live bytes) by the memo."""
        with self.host.database('cache') as db:
            live = dict(db.execute('SELECT chunk, sum(live) FROM uses '
                                   'GROUP BY chunk'))
        with self.host.database() as db:
            return {chunk: (db.execute(
                'SELECT plain FROM blocks WHERE name = ?', (chunk,)
                ).fetchone()[0], used) for chunk, used in live.items()}

    def marked(self):
        with self.host.database('cache') as db:
            return {row[0] for row in db.execute('SELECT chunk FROM repack')}

    def churn(self, numbers):
        for number in numbers:
            os.unlink(self.where('d/f%04d' % number))

    def test_churn(self):
        self.smalls(600, low=900, high=1100)
        self.sent()
        before = set(self.shared())
        self.churn([n for n in range(600) if n % 5])
        log = self.sent()
        self.assertEqual(self.chunks(log), 0)
        marked = self.marked()
        self.assertGreater(len(marked), 3)
        # The next run reads just what is in them, and packs it anew.
        log = self.sent()
        self.assertGreater(self.chunks(log), 0)
        self.assertLess(self.bytes(log, b'c'), 140000)
        self.assertEqual(self.marked(), set())
        after = self.shared()
        self.assertEqual(set(after) & marked, set())
        self.assertLess(len(after), len(before))
        for size, used in after.values():
            self.assertGreaterEqual(2 * used, size)
        self.last_is_the_tree()
        self.assertEqual(self.chunks(self.sent()), 0)

    def test_without_the_rule(self):
        self.smalls(600, low=900, high=1100)
        self.sent()
        self.churn([n for n in range(600) if n % 5])
        with mock.patch.object(tarsnap.Memo, 'mark', lambda *args: None):
            self.sent()
            self.assertEqual(self.chunks(self.sent()), 0)
        sizes = list(self.shared().values())
        self.assertGreater(sum(row[0] for row in sizes),
                           3 * sum(row[1] for row in sizes))

    def test_two_jobs_do_not_make_it_flip(self):
        """One job uses a tenth of the chunks that the other uses whole."""
        self.smalls(300, low=900, high=1100)
        few = ['d/f%04d' % number for number in range(0, 300, 10)]
        for turn in range(5):
            for job in (few, ['.']):
                log = self.sent(*job)
                if turn:
                    self.assertEqual(self.chunks(log), 0)
        self.assertEqual(self.marked(), set())
        self.last_is_the_tree()

    def test_half_is_enough(self):
        self.smalls(300, low=1000, high=1001)
        self.sent()
        self.churn([n for n in range(300) if n % 5 < 2])
        self.sent()
        self.assertEqual(self.chunks(self.sent()), 0)


@unittest.skipIf(not ROOT, 'needs root to give files to others')
class Owners(DedupTest):
    def test_chunks_never_mix_owners(self):
        owner = {}
        for number in range(200):
            path = self.write('d/f%04d' % number, self.rng.randbytes(2000))
            owner[b'd/f%04d' % number] = uid = number // 7 % 3
            os.chown(path, uid, 0)
        self.sent()
        self.assertEqual(self.mixed(owner), 0)
        self.last_is_the_tree()

    def test_without_the_rule_they_mix(self):
        owner = {}
        for number in range(200):
            path = self.write('d/f%04d' % number, self.rng.randbytes(2000))
            owner[b'd/f%04d' % number] = uid = number // 7 % 3
            os.chown(path, uid, 0)
        real = tarsnap.SharedStream.add
        with mock.patch.object(
                tarsnap.SharedStream, 'add',
                lambda stream, content, data, uid: real(stream, content,
                                                        data, 0)):
            self.sent()
        self.assertGreater(self.mixed(owner), 0)

    def mixed(self, owner):
        """How many chunks have bytes of several owners' files."""
        users = collections.defaultdict(set)
        for entry, page in entries(self.host, 'run-1'):
            for kid, _, _, _ in entry.extents:
                users[page.kids[kid].name].add(owner[entry.path[2:]])
        return sum(len(found) > 1 for found in users.values())


def entries(host, name):
    """(Entry, page) of an archive, read by name from the store."""
    remote = tarsnap.Remote(host.key, (lab.R,))
    opt = tarsnap.Settings()
    opt.finish()
    fetcher = tarsnap.Fetcher(remote)
    try:
        live = tarsnap.history_live(remote, opt)
        record = tarsnap.archive_find(remote, live, name.encode(), opt,
                                      fetcher)
        for page in tarsnap.archive_pages(fetcher, record):
            for entry in tarsnap.page_entries(page):
                if entry.kind == tarsnap.FILE:
                    yield entry, page
    finally:
        fetcher.close()
        remote.close()


class Large(DedupTest):
    def test_one_byte_inserted(self):
        data = self.rng.randbytes(40 * MB)
        self.write('f', data)
        first = self.bytes(self.sent())
        self.assertGreater(first, 40 * MB)
        at = self.rng.randrange(len(data))
        self.write('f', data[:at] + b'!' + data[at:])
        again = self.bytes(self.sent())
        self.assertLess(again, first * 0.02)
        self.last_is_the_tree()

    def test_zeros(self):
        with open(self.write('f'), 'wb') as file:
            for _ in range(100):
                file.write(bytes(MB))
        log = self.sent()
        self.assertLessEqual(self.chunks(log), 3)
        self.assertLess(len(log.puts()), 10)
        self.last_is_the_tree()

    def test_holes(self):
        with open(self.write('f'), 'wb') as file:
            file.truncate(1000 * MB)
            file.seek(500 * MB)
            file.write(b'here')
        log = self.sent()
        self.assertLessEqual(self.chunks(log), 2)
        self.assertLess(self.bytes(log), 20000)

    def test_one_byte_in_a_file_of_many_lists(self):
        """The index of a large file is a tree: little of it changes.

        200 MB of blocks that differ and cost little to deflate.
        """
        patch = mock.patch.object(tarsnap, 'CHUNK_MAX', 65536)
        patch.start()
        self.addCleanup(patch.stop)
        block = self.rng.randbytes(16)
        path = self.write('f')
        with open(path, 'wb') as file:
            for number in range(200 * MB // 65536):
                file.write((b'%015d|' % number + block) * 2048)
        first = self.sent()
        index = first.puts(b'i')
        self.assertGreater(len(index), 4)
        with open(path, 'r+b') as file:
            file.seek(self.rng.randrange(200 * MB))
            file.write(b'!')
        log = self.sent()
        self.assertLess(self.bytes(log, b'c'), MB)
        self.assertLess(self.bytes(log, b'i'),
                        self.bytes(first, b'i') / 2)
        self.assertLessEqual(len(log.puts(b'i')), 4)


class PageNames(DedupTest):
    """Pages stay the same as long as their entries do."""

    def test_one_file_elsewhere(self):
        for number in range(6000):
            self.write('d%02d/f%04d' % (number % 20, number), b'%d' % number)
        first = self.sent()
        self.assertGreater(len(first.puts(b'i')), 4)
        self.write('d10/new', b'new')
        log = self.sent()
        # Where the directory's own entry is, where the file is, and, once in
        # many keys, another that its name cuts off, with their list.
        self.assertLessEqual(len(log.puts(b'i')), 4)
        self.host.lose('cache')
        log = self.sent()
        self.assertEqual(len(log.puts(b'i')), 0, 'pages depend on the memo')

    def test_many_pages_have_lists(self):
        with lab.fine():
            for number in range(400):
                self.write('d%02d/f%04d' % (number % 20, number),
                           b'%d' % number)
            first = self.sent()
            self.write('d10/new', b'new')
            log = self.sent()
            self.assertLess(len(log.puts(b'i')), 8)
            self.assertGreater(len(first.puts(b'i')), 60)
            self.last_is_the_tree()

    def test_names_do_not_depend_on_the_run(self):
        """Two hosts, another level of deflate, no padding: same names."""
        self.smalls(200)
        self.write('large', self.rng.randbytes(MB))
        first = self.sent()
        real = tarsnap.Sealer.__init__

        def other(sealer, key, level=2, pad=True):
            real(sealer, key, 9, False)

        with mock.patch.object(tarsnap.Sealer, '__init__', other), \
                lab.tapped() as log:
            host = self.lab.host('b', key=self.lab.key)
            host.run('--fsck')
            host.create('again')
        self.assertEqual(log.puts(b'i'), [])
        self.assertEqual(log.puts(b'c'), [])
        self.assertGreater(len(first.puts(b'i')), 0)

    def test_chunks_do_not_depend_on_the_workers(self):
        """So many tiny files that the stream of their contents is ended for
        the sake of the pages that wait for it: where, is the same whether
        the workers find its windows at once or as late as they can.
        """
        for number in range(4000):
            self.write('d%02d/f%04d' % (number % 20, number),
                       self.rng.randbytes(120))
        real = tarsnap.Cutter.cut

        def late(cutter, most=0):
            return [] if most else real(cutter)

        def at_once(cutter, most=0):
            return real(cutter)

        with mock.patch.object(tarsnap, 'PAGES_WAITING', 5):
            with mock.patch.object(tarsnap.Cutter, 'cut', at_once), \
                    mock.patch.object(
                        tarsnap.SharedStream, 'flush', autospec=True,
                        side_effect=tarsnap.SharedStream.flush) as flush:
                first = self.sent()
            # One more than that at the end of the tree.
            self.assertGreater(flush.call_count, 1)
            self.assertGreater(len(first.puts(b'c')), 1)
            self.host.lose('cache')
            with mock.patch.object(tarsnap.Cutter, 'cut', late), \
                    mock.patch.object(tarsnap.Writer, 'small_find',
                                      lambda writer, digest: None):
                log = self.sent()
        self.assertEqual(log.puts(b'c'), [])
        self.assertEqual(log.puts(b'i'), [])
        self.last_is_the_tree()


if __name__ == '__main__':
    unittest.main()
