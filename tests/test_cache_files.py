# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The files of the cache directory: killed at any step, torn, full, foreign.

Whatever happens to them, the next run stores what the tree holds, with the
right counts, or says in one line what to do.
"""

import contextlib
import fcntl
import itertools
import os
import random
import sqlite3
import stat
import subprocess
import sys
import unittest
from unittest import mock

import lab
import many
import tarsnap
from lab import LabTest, R, snapshot
from test_counts import Audit

SEED = int(os.environ.get('SEED', random.SystemRandom().randrange(10 ** 6)))


def setUpModule():
    print('SEED=%d' % SEED)


class FilesTest(LabTest):
    def setUp(self):
        super().setUp()
        self.rng = random.Random('%s-%d' % (self.id(), SEED))
        for number in range(40):
            self.write('d/f%d' % number, self.rng.randbytes(3000))
        self.write('large', self.rng.randbytes(500000))
        self.runs = 0

    def file(self, name):
        return os.path.join(self.host.cache, name)

    def creating(self, name, *args):
        return ('-c', '-f', name, *args, '-C', self.lab.tree, '.')

    def audit(self):
        """Counts, statistics and the server's blocks agree."""
        audit = Audit(self.lab)
        with self.host.database() as db:
            found = {row[0]: row[1] for row in db.execute(
                'SELECT name, count FROM blocks')}
        self.assertEqual(found, audit.counts)
        totals = self.host.meta()[2]
        self.assertEqual((*totals[:4], totals[8]), audit.statistics())
        self.assertEqual(audit.reachable(), set(audit.live))

    def after(self):
        """A run after something happened: right, and cheap to check."""
        self.runs += 1
        name = 'after-%d' % self.runs
        self.write('d/new', b'%d' % self.runs)
        model = snapshot(self.lab.tree)
        self.host.create(name)
        self.host.check(name, model)
        self.assertFalse(os.path.exists(self.file('pending')))
        self.assertEqual(self.host.seq(), self.host.meta()[1].hex())


class Killed(FilesTest):
    """A run that ends at one step of its commit, and the next one."""

    def exits(self, owner, name, before=True, only=lambda *args: True):
        """The process ends before (or after) this function."""
        real = getattr(owner, name)

        def dies(*args, **kwargs):
            if before and only(*args):
                os._exit(9)
            out = real(*args, **kwargs)
            if only(*args):
                os._exit(9)
            return out
        return mock.patch.object(owner, name, dies)

    def commit_sent(self, before):
        return self.exits(
            tarsnap.Channel, 'call', before,
            lambda channel, kind, *body: kind == tarsnap.COMMIT)

    def renaming(self, before):
        return self.exits(os, 'rename', before, lambda *args:
                          str(args[1]).endswith('cseq'))

    def sealed(self, pending):
        return 'commit' in pending.meta

    def steps(self):
        """name -> (patch, whether the archive exists then)."""
        t = tarsnap
        return {
            'pending not sealed': (self.exits(t.Pending, 'seal'), False),
            'pending sealed': (self.exits(t.Pending, 'seal', False), None),
            'COMMIT not sent': (self.commit_sent(True), None),
            'answer lost': (self.commit_sent(False), True),
            'directory not applied': (self.exits(t.Cache, 'apply'), True),
            'directory half applied': (self.exits(
                t.Cache, 'apply_blocks', False), True),
            'directory nearly applied': (self.exits(
                t.Cache, 'save', False), True),
            'directory applied': (self.exits(t.Cache, 'apply', False), True),
            'memo half applied': (self.exits(t.Memo, 'take_over', False),
                                  True),
            'memo applied': (self.exits(t.Memo, 'apply', False), True),
            'cseq not renamed': (self.renaming(True), True),
            'cseq renamed': (self.renaming(False), True),
            'pending not removed': (self.exits(
                t.Pending, 'remove', True, self.sealed), True),
            'pending removed': (self.exits(
                t.Pending, 'remove', False, self.sealed), True)}

    def test_every_step(self):
        self.host.create('base')
        for number, (step, (patch, stored)) in enumerate(
                self.steps().items()):
            with self.subTest(step=step):
                name = 'killed-%d' % number
                self.write('d/killed', b'%d' % number * 100)
                model = snapshot(self.lab.tree)
                self.assertEqual(self.lab.crash(
                    self.host, patch, *self.creating(name)), 9)
                with lab.tapped() as log:
                    self.after()
                # A sealed transaction is made to exist by the next run.
                self.assertLess(len(log.puts(b'c')), 3)
                there = name in self.host.good('--list-archives',
                                               cache=False).out.split()
                self.assertEqual(there, stored is not False)
                if there:
                    self.host.check(name, model)
                self.audit()

    def test_first_run_killed_at_every_step(self):
        for step in self.steps():
            with self.subTest(step=step):
                self.setUp_again()
                patch, stored = self.steps()[step]
                self.assertEqual(self.lab.crash(
                    self.host, patch, *self.creating('first')), 9)
                self.after()
                self.audit()

    def setUp_again(self):
        self.lab = lab.Lab(self)
        self.host = self.lab.host()
        for number in range(5):
            self.write('f%d' % number, self.rng.randbytes(3000))

    def test_killed_twice(self):
        """The next run is killed in the middle of making it good."""
        self.host.create('base')
        for number, step in enumerate((
                'directory not applied', 'directory half applied',
                'directory applied', 'memo applied', 'cseq not renamed',
                'pending not removed')):
            with self.subTest(step=step):
                self.write('d/killed', b'%d' % number * 100)
                for first in ('answer lost', 'pending sealed'):
                    self.lab.crash(self.host, self.steps()[first][0],
                                   *self.creating('one-%d' % number))
                    self.lab.crash(self.host, self.steps()[step][0],
                                   '--recover')
                    self.after()
                    self.host.run('-d', '-f', 'one-%d' % number)
                self.audit()

    def test_delete_killed(self):
        for number, patch in enumerate((
                self.commit_sent(True), self.commit_sent(False),
                self.exits(tarsnap.Cache, 'catch_up', False,
                           lambda cache, changes: cache.n > 2),
                self.exits(tarsnap.Cache, 'absorb', False))):
            self.host.create('base-%d' % number)
            self.write('d/f1', b'%d' % number)
            self.host.create('kept-%d' % number)
            self.lab.crash(self.host, patch, '-d', '-f', 'base-%d' % number)
            self.after()
            self.host.run('-d', '-f', 'base-%d' % number)
            self.audit()

    def test_step_skipped_would_lose_counts(self):
        """The comparison is worth something: drop `pending` by hand."""
        self.host.create('base')
        self.write('d/killed', b'new')
        self.lab.crash(self.host, self.steps()['answer lost'][0],
                       *self.creating('two'))
        self.host.lose('pending', 'pending-journal')
        # Not even that loses anything: the history says what was put.
        self.after()
        self.audit()

    def test_checkpoint_killed(self):
        self.host.create('base', 'd')
        kill = {
            'sent': self.exits(
                tarsnap.Channel, 'call', False,
                lambda channel, kind, *body: kind == tarsnap.CHECKPOINT),
            'sealed': self.exits(tarsnap.Pending, 'seal', False),
            'applied': self.exits(tarsnap.Cache, 'apply', False),
            'going on': self.exits(tarsnap.Transaction, 'committed', False)}
        for step, patch in kill.items():
            with self.subTest(step=step):
                name = 'long-' + step.replace(' ', '-')
                for number in range(6):
                    self.write('big/f%d' % number,
                               self.rng.randbytes(700000))
                with lab.fine():
                    self.assertEqual(self.lab.crash(
                        self.host, patch, *self.creating(
                            name, '--checkpoint-bytes=1000000')), 9)
                self.host.good('--recover')
                names = self.host.good('--list-archives', cache=False
                                       ).out.split()
                self.assertIn(name + '.part', names)
                self.assertNotIn(name, names)
                target = self.lab.fresh()
                os.mkdir(target)
                result = self.host.run('-x', '-f', name + '.part', '-C',
                                       target, cache=False)
                self.assertIn('Truncated', result.err)
                found = snapshot(target)
                self.assertGreaterEqual(len(found), 3)
                for path, row in found.items():
                    if 'content' in row:
                        self.assertEqual(row, snapshot(self.lab.tree)[path])
                self.host.good('-d', '-f', name + '.part')
                self.after()
                self.audit()

    def test_fsck_killed(self):
        self.host.create('base')
        for owner, name in ((tarsnap.Cache, 'catch_up'),
                            (tarsnap.Cache, 'learn'),
                            (tarsnap.Cache, 'publish')):
            for before in (True, False):
                self.lab.crash(self.host, self.exits(owner, name, before),
                               '--fsck')
                result = self.host.run(*self.creating('maybe'))
                if result.status:
                    self.assertIn('--fsck', result.err)
                else:
                    self.host.good('-d', '-f', 'maybe')
                self.host.good('--fsck')
                self.audit()
        self.after()


class Torn(FilesTest):
    """Files cut, emptied, or with bytes flipped."""

    def save(self):
        out = {}
        for name in os.listdir(self.host.cache):
            path = self.file(name)
            if os.path.isfile(path):
                with open(path, 'rb') as file:
                    out[name] = file.read()
        return out, self.host.seq()

    def restore(self, saved):
        files, seq = saved
        for name in os.listdir(self.host.cache):
            os.unlink(self.file(name))
        for name, data in files.items():
            with open(self.file(name), 'wb') as file:
                file.write(data)
        os.symlink(seq, self.file('cseq'))

    def damages(self, data, count):
        yield b''
        yield b'\0' * len(data)
        yield b'not a database at all, whatever it says' * 100
        for length in (1, 50, 100, 4096, len(data) // 2, len(data) - 1):
            yield data[:length]
        for _ in range(count):
            out = bytearray(data)
            for _ in range(self.rng.choice((1, 4, 64))):
                out[self.rng.randrange(len(out))] ^= 1 << self.rng.randrange(
                    8)
            yield bytes(out)

    def right_or_told(self, name):
        """A run with damaged files; what it stores is the tree."""
        result = self.host.run(*self.creating(name))
        self.assertNotIn('Traceback', result.err)
        if result.status:
            # 2: stored, and then the cache directory could not be written.
            self.assertIn(result.status, (1, 2), result)
            self.assertIn('--fsck', result.err)
            self.host.good('--fsck')
            if result.status == 1:
                self.host.good(*self.creating(name))
        self.host.check(name, self.model)
        self.host.good('--fsck')
        self.audit()

    def each(self, file, count, prepare=lambda: None):
        prepare()
        self.lab.save()
        saved = self.save()
        self.write('d/f3', b'changed')
        os.utime(os.path.join(self.lab.tree, 'd/f4'), ns=(1, 1))
        self.model = snapshot(self.lab.tree)
        for number, data in enumerate(self.damages(saved[0][file], count)):
            with self.subTest(file=file, number=number):
                self.restore(saved)
                lab.shutil.rmtree(self.lab.store)
                self.lab.save_back()
                with open(self.file(file), 'wb') as out:
                    out.write(data)
                self.right_or_told('damaged')

    def setUp(self):
        super().setUp()
        self.host.create('base')
        self.write('d/f2', b'other')
        self.host.create('second')
        self.lab.save_back = lambda: lab.shutil.copytree(
            self.lab.path('saved'), self.lab.store, symlinks=True)

    def test_directory(self):
        self.each('directory', 12)

    def test_cache(self):
        self.each('cache', 12)

    def test_pending(self):
        def prepare():
            def die(channel, kind, *body):
                if kind == tarsnap.COMMIT:
                    os._exit(9)
                return real(channel, kind, *body)
            real = tarsnap.Channel.call
            self.write('d/pending', b'pending')
            self.assertEqual(self.lab.crash(
                self.host, mock.patch.object(tarsnap.Channel, 'call', die),
                *self.creating('undecided')), 9)
        self.each('pending', 12, prepare)

    def test_journals_left_over(self):
        """A hot journal of nonsense beside a good file."""
        for name in ('directory', 'cache', 'pending'):
            with open(self.file(name + '-journal'), 'wb') as file:
                file.write(b'nonsense' * 1000)
            self.model = snapshot(self.lab.tree)
            self.right_or_told('journal-' + name)

    def test_all_files_gone(self):
        for name in os.listdir(self.host.cache):
            os.unlink(self.file(name))
        result = self.host.run(*self.creating('three'))
        self.assertEqual(result.status, 1)
        self.assertIn('Run --fsck', result.err)
        self.host.good('--fsck')
        self.after()
        self.audit()

    def test_directory_of_another_machine(self):
        other = lab.register(self.lab.store)
        host = self.lab.host('other', key=other)
        host.cache = self.host.cache
        result = host.run(*self.creating('three'))
        self.assertEqual(result.status, 1)
        self.assertIn('another machine', result.err)
        self.assertIn('was of the key of another machine',
                      host.good('--fsck').err)
        self.assertNotIn('another', host.good('--fsck').err)
        host.good(*self.creating('three'))

    def test_torn_memo_row_is_not_believed(self):
        """Extents of a row whose hash is wrong are never used."""
        with contextlib.closing(sqlite3.connect(self.file('cache'))) as db:
            for number, body in db.execute(
                    'SELECT id, body FROM memo').fetchall():
                plain = bytearray(tarsnap.zlib.decompress(body))
                for at in range(40, len(plain), 50):
                    plain[at] ^= 1
                db.execute('UPDATE memo SET body = ?, digest = NULL '
                           'WHERE id = ?', (tarsnap.zlib.compress(
                               bytes(plain)), number))
            db.commit()
        self.store('three')


class Layout(FilesTest):
    """What other programs rely on."""

    def test_kinds_and_modes(self):
        old = os.umask(0)
        try:
            self.host.create('one')
        finally:
            os.umask(old)
        self.assertEqual(stat.S_IMODE(os.stat(self.host.cache).st_mode),
                         0o700)
        self.assertTrue(stat.S_ISREG(os.lstat(self.file('directory'))
                                     .st_mode))
        self.assertTrue(os.path.islink(self.file('cseq')))
        self.assertFalse(os.path.exists(self.file('cseq')))
        self.assertEqual(sorted(os.listdir(self.host.cache)),
                         ['cache', 'cseq', 'directory', 'lockf'])
        for name in ('directory', 'cache', 'lockf'):
            self.assertEqual(stat.S_IMODE(os.stat(self.file(name)).st_mode),
                             0o600, name)

    def test_looser_modes_are_tightened(self):
        self.host.create('one')
        os.chmod(self.host.cache, 0o777)
        os.chmod(self.file('directory'), 0o666)
        self.host.create('two')
        self.assertEqual(stat.S_IMODE(os.stat(self.host.cache).st_mode),
                         0o700)
        self.assertEqual(stat.S_IMODE(os.stat(self.file('directory'))
                                      .st_mode), 0o600)

    def test_cseq_changes_with_each_commit(self):
        seen = set()
        for number in range(3):
            self.host.create('a%d' % number)
            seen.add(self.host.seq())
        self.host.good('-d', '-f', 'a1')
        seen.add(self.host.seq())
        self.assertEqual(len(seen), 4)
        self.host.good('--list-archives', cache=False)
        self.host.good('-t', '-f', 'a0')
        self.host.good('--print-stats')
        self.assertIn(self.host.seq(), seen)
        for text in seen:
            int(text, 16)

    def test_same_cseq_after_fsck(self):
        self.host.create('one')
        before = self.host.seq()
        self.host.good('--fsck')
        self.assertEqual(self.host.seq(), before)

    def test_foreign_files_are_left_alone(self):
        os.mkdir(self.host.cache, 0o700)
        for name in ('firstrun', '.keep', 'cache.old'):
            with open(self.file(name), 'w') as file:
                file.write(name)
        os.mkdir(self.file('folder'))
        self.host.create('one')
        self.host.good('--fsck')
        self.host.good('-d', '-f', 'one')
        for name in ('firstrun', '.keep', 'cache.old'):
            with open(self.file(name)) as file:
                self.assertEqual(file.read(), name)
        self.assertTrue(os.path.isdir(self.file('folder')))

    def test_flock_does_not_stop_us(self):
        """An outer flock on the same file is somebody else's business."""
        self.host.create('one')
        with open(self.file('lockf'), 'r+') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            pid = os.fork()
            if not pid:
                status = 99
                try:
                    status = self.host.run(*self.creating('two')).status
                finally:
                    os._exit(status)
            self.assertEqual(os.waitstatus_to_exitcode(
                os.waitpid(pid, 0)[1]), 0)

    def test_lockf_does(self):
        self.host.create('one')
        inode = os.stat(self.file('lockf')).st_ino
        holder = subprocess.Popen(
            [sys.executable, '-c', 'import fcntl, sys\n'
             'f = open(sys.argv[1], "r+")\n'
             'fcntl.lockf(f, fcntl.LOCK_EX)\nprint("held", flush=True)\n'
             'sys.stdin.read()', self.file('lockf')],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            holder.stdout.readline()
            for args in (self.creating('two'), ('-d', '-f', 'one'),
                         ('--fsck',), ('--recover',)):
                result = self.host.run(*args)
                self.assertEqual(result.status, 1, (args, result))
                self.assertIn('Transaction already in progress', result.err)
            for args in (('--list-archives',), ('-t', '-f', 'one'),
                         ('--print-stats',)):
                self.host.good(*args)
        finally:
            holder.communicate()
        self.host.create('two')
        self.assertEqual(os.stat(self.file('lockf')).st_ino, inode)


class NoSpace(FilesTest):
    """A full disk under the cache directory."""

    def test_limits_on_file_size(self):
        """Every write beyond some size fails; whatever ends, ends clean."""
        import resource
        import signal
        self.host.create('base')
        size = os.path.getsize(self.file('directory'))
        for number, limit in enumerate((0, 512, 5000, 20000, size // 2,
                                        size, size + 4096)):
            name = 'full-%d' % number
            self.write('d/full', self.rng.randbytes(100))
            for at in range(40):
                self.write('e/g%d-%d' % (number, at), b'%d' % at)
            model = snapshot(self.lab.tree)
            pid = os.fork()
            if not pid:
                status = 99
                try:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE,
                                       (limit, limit))
                    status = self.host.run(*self.creating(name)).status
                except OSError:
                    status = 1          # the limit met the test's own files
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            self.assertIn(status, (0, 1, 2), limit)
            self.after()
            if status == 0 or name in self.host.good(
                    '--list-archives', cache=False).out.split():
                self.host.check(name, model)
            self.audit()

    def full(self, file, statement):
        """SQLite finds the disk full at such a statement."""
        real = tarsnap.database

        class Full:
            def __init__(self, db):
                self.db = db

            def __getattr__(self, name):
                return getattr(self.db, name)

            def check(self, sql):
                if sql.startswith(statement):
                    if self.db.in_transaction:      # so SQLite does, too
                        self.db.execute('ROLLBACK')
                    raise sqlite3.OperationalError(
                        'database or disk is full')

            def execute(self, sql, *args):
                self.check(sql)
                return self.db.execute(sql, *args)

            def executemany(self, sql, *args):
                self.check(sql)
                return self.db.executemany(sql, *args)

        def opened(path, script, synchronous):
            db = real(path, script, synchronous)
            return Full(db) if os.path.basename(path) == file else db

        return mock.patch.object(tarsnap, 'database', opened)

    def test_sqlite_says_full(self):
        self.host.create('base')
        for number, (file, statement) in enumerate((
                ('pending', 'INSERT'), ('pending', 'COMMIT'),
                ('directory', '\n            INSERT INTO blocks'),
                ('directory', 'INSERT OR REPLACE INTO meta'),
                ('directory', 'COMMIT'), ('cache', 'INSERT INTO memo'),
                ('cache', 'COMMIT'))):
            with self.subTest(file=file, statement=statement):
                name = 'full-%d' % number
                self.write('d/full', b'%d' % number)
                model = snapshot(self.lab.tree)
                with self.full(file, statement):
                    result = self.host.run(*self.creating(name))
                self.assertNotIn('Traceback', result.err)
                if file == 'cache':     # safe to lose
                    self.assertEqual(result.status, 0, result)
                else:
                    self.assertIn(result.status, (1, 2), result)
                    self.assertIn('full', result.err)
                self.after()
                if name in self.host.good('--list-archives', cache=False
                                          ).out.split():
                    self.host.check(name, model)
                self.audit()


class CaughtUp(LabTest):
    """What another host committed: each commit whole, or not at all."""

    COMMITS = 7

    def setUp(self):
        super().setUp()
        with open(self.lab.path('key'), 'wb') as file:
            file.write(tarsnap.key_text(tarsnap.key_encode(self.lab.key)))
        for number in range(40):
            self.write('f%d' % number, b'%d' % number)
        self.host.create('first')
        many.Many(self.lab.store, self.lab.path('key')).make(self.COMMITS)
        self.remote = tarsnap.Remote(self.lab.key, (R,))
        self.addCleanup(self.remote.close)

    def changes(self, cache, good):
        """So many changes, then what is none."""
        yield from itertools.islice(tarsnap.history_changes(
            self.remote, (cache.n, cache.head)), good)
        raise tarsnap.CorruptError('forged')

    def test_what_came_before_an_error_is_kept(self):
        for batch in (1, 3, 256):
            with self.subTest(batch), mock.patch.object(
                    tarsnap, 'CATCH_UP', batch):
                cache = tarsnap.Cache(self.host.cache, self.lab.key)
                before = cache.n
                try:
                    with self.assertRaises(tarsnap.CorruptError):
                        cache.catch_up(self.changes(cache, 2))
                    self.assertEqual(cache.n, before + 2)
                finally:
                    cache.close()
                cache = tarsnap.Cache(self.host.cache, self.lab.key)
                self.assertEqual((cache.n, len(cache.archives())),
                                 (before + 2, before + 2))
                cache.close()

    def test_half_a_commit_is_taken_back(self):
        cache = tarsnap.Cache(self.host.cache, self.lab.key)
        self.addCleanup(cache.close)
        before = cache.n
        real, left = cache.archives_change, [3]

        def full(*args):
            left[0] -= 1
            if not left[0]:
                raise sqlite3.OperationalError('database or disk is full')
            real(*args)

        with mock.patch.object(cache, 'archives_change', full), \
                self.assertRaises(sqlite3.OperationalError):
            cache.catch_up(self.changes(cache, 5))
        self.assertEqual((cache.n, len(cache.archives())),
                         (before + 2, before + 2))
        self.assertEqual(len(cache.unread(100)), 2)     # records, put
        with self.assertRaises(tarsnap.CorruptError):
            cache.catch_up(self.changes(cache, 100))
        self.assertEqual(cache.n, 1 + self.COMMITS)

    def totals(self, rows):
        """Each block's totals are its bytes and all below, times counted."""
        blocks = {row[0]: row for row in rows}

        def total(name):
            _, _, _, plain, stored, _, _, kids = blocks[name]
            for _, kid, _, times in tarsnap.KID.iter_unpack(kids or b''):
                below = total(kid)
                plain += times * below[0]
                stored += times * below[1]
            return plain, stored

        for name, row in blocks.items():
            self.assertEqual(row[5:7], total(name))

    def test_references_entered_in_pieces(self):
        with lab.fine():            # many pages, by names that are new
            for number in range(40):
                self.write('d/g%d' % number, b'%d' % number)
            self.host.create('second')
        found = []
        for most in (0, 10 ** 6):
            with mock.patch.object(tarsnap, 'LEARN', most), mock.patch.object(
                    tarsnap.Cache, 'gather', autospec=True,
                    side_effect=tarsnap.Cache.gather) as gather:
                self.host.good('--fsck')
            with self.host.database() as db:
                found.append((db.execute('SELECT * FROM blocks').fetchall(),
                              db.execute('SELECT * FROM small').fetchall(),
                              gather.call_count))
        self.assertEqual(found[0][:2], found[1][:2])
        self.totals(found[0][0])
        self.assertGreater(len(found[0][1]), 30)
        self.assertGreater(found[0][2], found[1][2])


if __name__ == '__main__':
    unittest.main()
