# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Faults that a reading of the write path found, each with its scenario.

The client runs in this process against an embedded store (lab.py); a
connection is lost where a test says so, before or after the server has served
a frame.
"""

import contextlib
import errno
import os
import random
import shutil
import unittest
from unittest import mock

import lab
import tarsnap
import tarsnapd

MIB = 1 << 20


def noise(size, seed):
    return random.Random(repr(seed)).randbytes(size)


@contextlib.contextmanager
def wire(hook):
    """Ask `hook(kind, body, local)` before each frame a session serves.

    'before' loses the connection with the frame, 'after' with the answer; a
    callable is called when the frame has been served, and its answer kept.
    """
    real = tarsnapd.Local.receive

    def receive(local, kind, rid, body):
        what = hook(kind, body, local)
        if what == 'before':
            raise ConnectionResetError(errno.ECONNRESET, 'cut by the test')
        answers = real(local, kind, rid, body)
        if what == 'after':
            list(answers)
            raise ConnectionResetError(errno.ECONNRESET, 'cut by the test')
        if callable(what):
            answers = list(answers)
            what()
        return answers

    with mock.patch.object(tarsnapd.Local, 'receive', receive):
        yield


def once(kind, what, number=1):
    """A hook: `what` at the `number`-th frame of `kind`, once."""
    seen = []

    def hook(found, body, local):
        if found == kind:
            seen.append(body)
            if len(seen) == number:
                return what(local) if callable(what) else what
        return None

    hook.seen = seen
    return hook


def spool_lost(local):
    """The connection goes, and with it all that was not committed."""
    session = local.session
    session.batch = []
    spool = session.tx.spool
    if spool.fd is not None:
        os.ftruncate(spool.fd, len(tarsnapd.SEGMENT_MAGIC))
    return 'before'


class Reading(lab.LabTest):

    def test_read_error_leaves_nothing_in_the_next_file(self):
        """EIO in the middle of one large file; the next one is whole."""
        self.write('d/1-bad', noise(3 * MIB, 1))
        self.write('d/2-good', noise(2 * MIB, 2))
        model = lab.snapshot(self.lab.tree)
        del model[b'd/1-bad']
        real = os.pread

        def fails(fd, size, pos):
            if pos >= MIB and os.readlink(
                    '/proc/self/fd/%d' % fd).endswith('1-bad'):
                raise OSError(errno.EIO, 'Input/output error')
            return real(fd, size, pos)

        with mock.patch.object(os, 'pread', fails):
            self.host.create('one', status=2)
        self.host.check('one', model)

    def test_times_before_1677(self):
        """A time that does not fit 64 bits of nanoseconds is a time."""
        path = self.write('ancient', b'x')
        try:
            os.utime(path, ns=(-12 * 10 ** 18, -12 * 10 ** 18))
        except OverflowError:
            self.skipTest('utime cannot say it')
        real = os.stat

        def stat(name, **options):
            st = real(name, **options)
            if os.fsencode(name).endswith(b'ancient'):
                return Old(st)
            return st

        with mock.patch.object(os, 'stat', stat):
            self.host.create('one')
            self.host.create('two')

    def test_path_as_long_as_a_row_takes(self):
        """From 65 536 bytes on a path is refused, shorter ones are stored."""
        names = ['%s%02d' % ('n' * 198, i) for i in range(325)]
        top = fd = os.open(self.lab.tree, os.O_RDONLY)
        for name in names:
            os.mkdir(name, dir_fd=fd)
            fd = os.open(name, os.O_RDONLY, dir_fd=fd)
        for extra in range(130, 250, 7):
            os.close(os.open('f' * extra, os.O_CREAT | os.O_WRONLY,
                             dir_fd=fd))
        self.assertNotEqual(top, fd)
        result = self.host.run('-c', '-f', 'one', '-C', self.lab.tree, '.')
        self.assertEqual(result.status, 2, result)
        self.assertIn('path too long', result.err)

    def test_command_line_of_short_words(self):
        """What argv takes in a record is counted as it is packed."""
        self.write('a', b'a')
        self.host.create('one', *['a'] * 70000, status=0)
        self.assertIn(b'one', self.host.good('--list-archives').out.encode())

    def test_attributes_beyond_all_measure(self):
        """One file whose attributes fit no page does not end the run."""
        self.write('good', b'good')
        path = self.write('strange', b'strange')
        names = ['user.%04d' % i for i in range(6500)]

        def listxattr(where, **options):
            return names if is_strange(where) else []

        def getxattr(where, name, **options):
            return b'%d' % 7 * 4090 + os.fsencode(name)

        with mock.patch.object(os, 'listxattr', listxattr), \
                mock.patch.object(os, 'getxattr', getxattr):
            result = self.host.run('-c', '-f', 'one', '-C', self.lab.tree,
                                   '.')
        self.assertEqual(result.status, 2, result)
        self.assertIn('strange', result.err)
        target = self.host.extract('one')
        self.assertEqual(sorted(os.listdir(target)), ['good'], path)

    def test_long_names_of_owners(self):
        """Rows are as long as the owners' names make them."""
        for i in range(1500):
            os.mkdir(os.path.join(self.lab.tree, '%03x' % i))
        with mock.patch.object(tarsnap, 'owner_names',
                               lambda uid, gid: (b'u' * 255, b'g' * 255)), \
                mock.patch.object(tarsnap.Writer, 'page_ends',
                                  lambda writer, member: False):
            self.host.create('one')


class Old:
    """A stat result from the year 1589."""

    def __init__(self, st):
        self.st = st
        self.st_mtime_ns = -12 * 10 ** 18

    def __getattr__(self, name):
        return getattr(self.st, name)


def is_strange(where):
    if isinstance(where, int):
        where = os.readlink('/proc/self/fd/%d' % where)
    return os.fsencode(where).endswith(b'strange')


class Connections(lab.LabTest):

    def setUp(self):
        super().setUp()
        for i in range(6):
            self.write('f%d' % i, noise(400000, i))
            self.write('s%d' % i, noise(900, 'small%d' % i))
        self.enterContext(lab.fine())

    def enterContext(self, context):        # unittest has it from 3.11 on
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def test_lost_after_a_checkpoint(self):
        """The archive NAME.part that exists then is our own."""
        hook = self.after_checkpoint('before')
        with wire(hook):
            self.store('one', '--checkpoint-bytes=1000000')

    def after_checkpoint(self, what):
        state = []

        def hook(kind, body, local):
            if kind == tarsnap.CHECKPOINT:
                state.append(kind)
            elif kind == tarsnap.PUT and state == [tarsnap.CHECKPOINT]:
                state.append('cut')
                return what
            return None
        return hook

    def test_spool_lost_at_any_put(self):
        """The run walks again, whatever its threads were at."""
        for number in (2, 20, 60, 150):
            self.host.lose('directory', 'cache', 'pending')
            self.host.good('--fsck')
            for i in range(6):
                self.write('f%d' % i, noise(400000, (number, i)))
            with wire(once(tarsnap.PUT, spool_lost, number)):
                self.store('at %d' % number)

    def test_lost_with_the_withdrawal(self):
        """Puts of a dead run are withdrawn, also over a broken wire."""
        for turn, what in enumerate(('before', 'after')):
            for i in range(6):
                self.write('dead%d-%d' % (turn, i), noise(100000,
                                                          (turn, i)))
            # A dead run has put what the next one does not use.
            self.lab.crash(self.host, wire(
                lambda kind, body, local: os._exit(7)
                if kind == tarsnap.COMMIT else None),
                '-c', '-f', 'dead', '-C', self.lab.tree, '.')
            self.lose_commit()
            for i in range(6):
                os.unlink(os.path.join(self.lab.tree,
                                       'dead%d-%d' % (turn, i)))
            self.write('new', noise(5000, turn))
            hook = once(tarsnap.WITHDRAW, what)
            with wire(hook):
                self.store('next%d' % turn)
            self.assertTrue(hook.seen)

    def lose_commit(self):
        """Make the dead run's `pending` one that died before its commit."""
        with self.host.database('pending') as db:
            db.execute("DELETE FROM meta WHERE key = 'commit'")
            db.commit()

    def test_withdrawal_lost_does_not_walk_again(self):
        """A record withdrawn in a conflict is withdrawn again, no more."""
        other = self.lab.host('b')
        other.good('--fsck')
        small = self.lab.path('small')
        os.mkdir(small)
        with open(os.path.join(small, 'x'), 'wb') as file:
            file.write(noise(3000, 'other'))
        real, walks = tarsnap.Transaction.again, []

        def conflict(local):
            """Somebody commits just before us."""
            with wire(lambda *_: None):
                other.create('other', tree=small)

        cut = []

        def hook(kind, body, local):
            if kind == tarsnap.COMMIT and not cut:
                cut.append('conflict')
                conflict(local)
            elif kind == tarsnap.WITHDRAW and cut == ['conflict']:
                cut.append('cut')
                return 'before'
            return None

        def again(txn):
            walks.append(txn)
            real(txn)

        with wire(hook), mock.patch.object(tarsnap.Transaction, 'again',
                                           again):
            self.store('one')
        self.assertEqual(cut, ['conflict', 'cut'])
        self.assertEqual(walks, [])

    def test_commit_decided_while_we_ask(self):
        """The answer is lost, and the commit done after we looked."""
        for kind, flags in ((tarsnap.COMMIT, ()), (tarsnap.CHECKPOINT, (
                '--checkpoint-bytes=1000000',))):
            real, told = tarsnap.commit_decided, []
            for i in range(6):
                self.write('f%d' % i, noise(400000, (kind, i)))

            def decided(remote, base, raw):
                found = real(remote, base, raw)
                if not told:
                    told.append(found)
                    return None         # as it was a moment ago
                return found

            with wire(once(kind, 'after')), \
                    mock.patch.object(tarsnap, 'commit_decided', decided):
                self.store('by %d' % kind, *flags)
            self.assertEqual(len(told), 1)


class Elsewhere(lab.LabTest):
    """The answer to COMMIT is lost, and the next server of the same store
    holds less than was put: what the first one has may still come true.
    """

    def setUp(self):
        super().setUp()
        self.other = self.lab.host('b')
        self.other.good('--fsck')
        self.second = self.lab.path('second')
        tarsnapd.server_create(self.second, {
            'store': os.path.join(self.lab.store, 'store')})
        shutil.copy(os.path.join(self.lab.store, 'identity.key'), self.second)
        self.held = None            # (session, COMMIT's frame) of the first
        self.landed = []            # answers to it
        self.commits = []           # kinds of those that the second got
        for i in range(6):
            self.write('f%d' % i, noise(400000, i))

    def land(self):
        """The first server does what it was asked long ago."""
        local, frame = self.held
        self.landed += list(local.receive(tarsnap.COMMIT, 1, frame))

    def store_elsewhere(self, kind, action):
        """-c with the answer lost; `action` at the next frame of `kind` that
        the second server gets.
        """
        real_open, real_close = tarsnapd.open_local, tarsnapd.Local.close
        done = []

        def hook(found, body, local):
            if self.held and local is self.held[0]:
                return None
            if found == tarsnap.COMMIT and not self.held:
                self.held = local, body
                return 'before'
            if found == tarsnap.COMMIT:
                self.commits.append(tarsnap.commit_unpack(
                    body, self.host.key).kind)
            if found == kind and self.held and not done:
                done.append(found)
                action()
            return None

        def close(local):
            if not self.held or local is not self.held[0]:
                real_close(local)

        def open_local(path, *args, **options):
            return real_open(self.second if self.held and not done else path,
                             *args, **options)

        with wire(hook), mock.patch.object(tarsnapd, 'open_local',
                                           open_local), \
                mock.patch.object(tarsnapd.Local, 'close', close):
            try:
                self.store('one')
            finally:
                real_close(self.held[0])
        self.assertEqual(done, [kind])

    def whole(self, *archives):
        """These, each whole and once, and the cache knows it."""
        self.assertEqual(self.host.good('--list-archives').out.split(),
                         list(archives))
        with self.host.database() as db:
            rows = dict(db.execute('SELECT name, stored FROM blocks'))
        self.assertEqual({name: row[1] for name, row in
                          self.lab.live().items()}, rows)

    def test_first_server_is_slow(self):
        """It comes second to the empty commit, and is refused."""
        self.store_elsewhere(tarsnap.PUT, self.land)
        self.assertEqual([kind for kind, _, _ in self.landed],
                         [tarsnap.ERROR])
        self.assertEqual(self.commits, [tarsnap.KIND_ABORT,
                                        tarsnap.KIND_WRITE])
        self.whole('one')

    def test_first_server_is_slow_but_faster_than_we(self):
        """What it took is the archive; nothing is walked again."""
        self.store_elsewhere(tarsnap.COMMIT, self.land)
        self.assertEqual([kind for kind, _, _ in self.landed],
                         [tarsnap.COMMITTED])
        self.assertEqual(self.commits, [tarsnap.KIND_ABORT])
        self.whole('one')

    def test_first_server_was_faster_and_it_is_deleted(self):
        """What was stored and deleted since is not stored again."""
        def action():
            self.land()
            self.other.good('-d', '-f', 'one')
        with mock.patch.object(lab.Host, 'check', lambda *_: None):
            self.store_elsewhere(tarsnap.COMMIT, action)
        self.assertEqual(self.other.good('--list-archives').out, '')
        self.assertEqual(self.lab.live(), {})


class Conflicts(lab.LabTest):

    def setUp(self):
        super().setUp()
        self.other = self.lab.host('b')
        self.other.good('--fsck')
        self.host.good('--fsck')
        for i in range(6):
            self.write('f%d' % i, noise(400000, i))
        small = lab.fine()
        small.__enter__()
        self.addCleanup(small.__exit__, None, None, None)

    def at(self, kind, action, number=1):
        """Do something just before the n-th frame of a kind is served."""
        def act(local):
            with wire(lambda *_: None):
                action()
        return wire(once(kind, act, number))

    def stored(self):
        """The statistics must be those of the blocks that are live."""
        live = self.lab.live()
        with self.host.database() as db:
            rows = dict(db.execute('SELECT name, stored FROM blocks'))
        self.assertEqual({name: row[1] for name, row in live.items()}, rows)
        self.assertEqual(self.host.meta()[2][3], sum(rows.values()))

    def test_part_deleted_by_another_host(self):
        """Our checkpoint goes while we run; the archive is made whole."""
        with self.at(tarsnap.COMMIT, lambda: self.other.good(
                '-d', '-f', 'one.part')):
            self.store('one', '--checkpoint-bytes=1000000')
        self.assertEqual(self.host.good('--list-archives').out, 'one\n')
        self.stored()

    def test_nuke_in_mid_run(self):
        def nuke():
            with mock.patch('sys.stdin') as stdin:
                stdin.buffer.readline = lambda most: b'No Tomorrow\n'
                self.other.good('--nuke')
        with self.at(tarsnap.COMMIT, nuke):
            self.store('one', '--checkpoint-bytes=1000000')
        self.assertEqual(self.host.good('--list-archives').out, 'one\n')
        self.stored()

    def test_both_store_the_same(self):
        """What another host stored first is not our new data."""
        with self.at(tarsnap.COMMIT, lambda: self.other.create('two')):
            self.store('one')
        self.stored()
        for name in ('one', 'two'):
            self.host.good('-d', '-f', name)
        self.assertEqual(self.lab.live(), {})
        self.assertEqual(self.host.meta()[2][:4], (0, 0, 0, 0))

    def test_deleted_while_the_references_are_read(self):
        """Somebody deletes what we are about to read."""
        self.other.create('gone')
        with self.at(tarsnap.GET, lambda: self.other.good('-d', '-f',
                                                          'gone')):
            self.store('one')
        self.host.create('two')
        self.stored()


class Files(lab.LabTest):

    def test_write_and_prune_without_read(self):
        """Such a key reads references with its delete role."""
        self.write('a', b'a' * 100)
        host = self.lab.host('b', roles=(lab.W, lab.D))
        host.good('--fsck')
        self.host.create('one')
        self.write('b', b'b' * 100)
        host.create('two')
        host.good('-d', '-f', 'one')
        self.host.check('two', lab.snapshot(self.lab.tree))

    def test_pending_torn_by_a_power_cut(self):
        """What a dead run noted is of no use; its damage is no error."""
        for i in range(3):
            self.write('f%d' % i, noise(400000, i))
        pid = self.lab.crash(self.host, wire(
            lambda kind, body, local: os._exit(7) if kind == tarsnap.COMMIT
            else None), '-c', '-f', 'dead', '-C', self.lab.tree, '.')
        self.assertEqual(pid, 7)
        path = os.path.join(self.host.cache, 'pending')
        with self.host.database('pending') as db:
            db.execute("DELETE FROM meta WHERE key = 'commit'")
            db.execute('CREATE TABLE filler(x)')
            db.executemany("INSERT INTO delta(name, kids) VALUES(?, ?)",
                           [(os.urandom(32), bytes(900))] * 400)
            db.commit()
        with open(path, 'r+b') as file:
            size = os.path.getsize(path)
            for page in range(8, size // 4096):
                file.seek(page * 4096)
                file.write(os.urandom(4096))
        self.store('one')

    def test_abort_that_comes_second(self):
        """A commit that another server took after all is ours."""
        self.write('a', noise(5000, 'a'))
        status = self.lab.crash(self.host, wire(
            lambda kind, body, local: os._exit(7) if kind == tarsnap.COMMIT
            else None), '-c', '-f', 'dead', '-C', self.lab.tree, '.')
        self.assertEqual(status, 7)
        real = tarsnap.commit_alone

        def alone(remote, commit, lineage, raw):
            if commit.kind == tarsnap.KIND_ABORT:
                # The old connection's commit was still under way.
                with write.database('pending') as db:
                    sealed, = db.execute("SELECT value FROM meta WHERE "
                                         "key = 'commit'").fetchone()
                real(remote, tarsnap.commit_unpack(sealed, self.host.key),
                     lineage, sealed)
            elif not tried:
                tried.append(raw)
                raise tarsnap.Refused(tarsnap.E_MISMATCH, 'not here')
            return real(remote, commit, lineage, raw)

        tried = []
        write = self.lab.host('w', roles=(lab.W,))
        with mock.patch.object(tarsnap, 'commit_alone', alone):
            os.rename(self.host.cache, write.cache)
            write.create('next')
        with write.database() as db:
            self.assertEqual(db.execute(
                "SELECT count(*) FROM blocks WHERE kids IS NULL AND "
                "cls <> 'c'").fetchone(), (0,))
        self.assertEqual(write.meta()[2][8], 2)


class Notes(lab.LabTest):

    def test_a_note_that_does_not_open_stops_nobody(self):
        """A stolen write key can sign a commit with any: the others go on, and
        say that their statistics may be wrong.
        """
        self.write('file', b'one')
        other = self.lab.host('other')
        self.host.create('first')
        other.good('--fsck')
        other.create('second')
        with mock.patch.object(tarsnap, 'note_seal', lambda *args: b'x' * 64):
            self.host.create('third')
        self.assertIn('note does not open; statistics',
                      other.create('fourth').err)
        self.assertEqual(other.good('-d', '-f', 'third').out, '')
        self.assertEqual(sorted(self.lab.host('new').good(
            '--list-archives').out.split()), ['first', 'fourth', 'second'])
        for host in (self.host, other):
            host.good('--fsck')
            host.good('--print-stats')


if __name__ == '__main__':
    unittest.main()
