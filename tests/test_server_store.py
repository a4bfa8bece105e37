# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The n-th write, fsync or link fails, for every n: failed, never corrupt."""

import errno
import os
import sqlite3
import stat
import time
import unittest
from unittest import mock

from rawclient import (
    COMPLETE, R, W, Client, Embedded, Error, Host, block, get, put,
    server_directory, sha, tarsnapd, u64)

CALLS = ('write', 'fsync', 'link')


class FaultyOs:
    """The os module, with the n-th of some calls failing.

    With `torn`, a write that fails has written half of its bytes; with
    `late`, the call has its effect and fails nevertheless; with `forever`
    all later ones fail too.  `log` has what was done, for the order.
    """

    def __init__(self, n=0, error=errno.EIO, torn=False, late=False,
                 forever=False):
        self.n = n
        self.error = error
        self.torn = torn
        self.late = late
        self.forever = forever
        self.count = 0
        self.log = []

    def __getattr__(self, name):
        return getattr(os, name)

    def due(self):
        self.count += 1
        return self.count == self.n or (
            self.forever and self.n and self.count > self.n)

    def fail(self):
        raise OSError(self.error, os.strerror(self.error))

    def write(self, fd, data):
        if stat.S_ISFIFO(os.fstat(fd).st_mode) or not self.due():
            # Short writes are allowed at any time.
            return os.write(fd, data[:25000])
        if self.torn:
            os.write(fd, data[:len(data) // 2])
        return self.fail()

    def fsync(self, fd):
        due = self.due()
        if due and not self.late:
            self.fail()
        os.fsync(fd)
        self.log.append(('fsync', os.fstat(fd).st_ino))
        return self.fail() if due else None

    def link(self, source, target):
        due = self.due()
        if due and not self.late:
            self.fail()
        os.link(source, target)
        self.log.append(('link', target))
        return self.fail() if due else None

    def mkdir(self, path, mode):
        os.mkdir(path, mode)
        self.log.append(('link', path))


class Faults(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        client = self.connect()
        self.host = Host(client)
        client.auth(self.host.machine, self.host.keys, R, W)
        self.host.backup(client, 'before')
        client.close()
        self.round = 0
        self.addCleanup(setattr, tarsnapd, 'os', os)

    def connect(self):
        client = Client(Embedded(self.path))
        if hasattr(self, 'host'):
            client.auth(self.host.machine, self.host.keys, R, W)
        return client

    def attempt(self, fault):
        """One backup under a fault.

        (acknowledged, its record and names, transaction id, commit)
        """
        self.round += 1
        client = self.connect()
        tid, blocks = os.urandom(16), [
            block('c', 'f%d-%d' % (self.round, i), 40000) for i in range(12)]
        record = block('a', 'f%d' % self.round)
        names = [one[0] for one in blocks] + [record[0]]
        link = [(sha(record[0]), record[0], bytes(16), COMPLETE)]
        commit = self.host.build(tid, puts=names, linked=link)
        tarsnapd.os = fault
        done = False
        try:
            self.host.begin(client, tid)
            for one in blocks + [record]:
                put(client, one)
            done = client.call('COMMIT', commit)[0] == 'COMMITTED'
        except Error as e:
            self.assertIn(e.code, ('INTERNAL', 'EXPIRED'))
            tarsnapd.os = os
            done = self.insist(client, blocks + [record], commit)
        finally:
            tarsnapd.os = os
            client.close()
        return done, tid, blocks + [record], commit, link

    @staticmethod
    def insist(client, blocks, commit):
        """A client that goes on after an error as if nothing were."""
        client.link.frames.clear()
        try:
            return client.call('COMMIT', commit)[0] == 'COMMITTED'
        except Error as e:
            if e.code == 'INTERNAL':
                return False
        try:
            for one in blocks:
                put(client, one)
            return client.call('COMMIT', commit)[0] == 'COMMITTED'
        except Error:
            return False

    def check(self, outcome):
        """A fresh process: nothing acknowledged is lost, all goes on."""
        done, tid, blocks, commit, link = outcome
        names = [one[0] for one in blocks]
        client = self.connect()
        n = int.from_bytes(client.call('STAT')[1][:8], 'big')
        if done:
            self.assertEqual(n, self.host.n + 1)
        if n == self.host.n:
            # Not decided: go on where it stopped.
            self.host.begin(client, tid)
            held, _, _ = self.host.begin(client, tid)
            for one in blocks[held:]:
                put(client, one)
        self.assertEqual(client.call('COMMIT', commit)[0], 'COMMITTED')
        self.host.remember(commit, link)
        self.assertEqual(get(client, names), [one[2] for one in blocks])
        client.close()

    def check_all(self, **how):
        """For every n up to the calls that one backup makes."""
        acknowledged = n = 0
        while True:
            n += 1
            fault = FaultyOs(n, **how)
            outcome = self.attempt(fault)
            acknowledged += outcome[0]
            self.check(outcome)
            if fault.count < n:
                break
        self.assertGreater(n, 20)
        self.assertTrue(outcome[0], 'the last attempt had no fault')
        self.same_when_rebuilt()
        return n, acknowledged

    def same_when_rebuilt(self):
        server = tarsnapd.Server(self.path)
        number = self.host.machine
        before = server.perform(('index', number, 'dump'))
        server.perform(('index', number, 'reset'))
        server.run(tarsnapd.catch_up(number))
        self.assertEqual(server.perform(('index', number, 'dump')), before)
        server.close()

    def test_each_call_fails_once(self):
        n, acknowledged = self.check_all()
        # The put of the log entry is tried again, so some go through.
        self.assertLess(0, acknowledged)
        self.assertLess(acknowledged, n)

    def test_each_write_is_torn(self):
        self.check_all(error=errno.ENOSPC, torn=True)

    def test_each_call_works_and_says_it_failed(self):
        self.check_all(late=True)

    def test_from_a_call_on_everything_fails(self):
        self.check_all(forever=True)

    def test_what_is_acknowledged_was_synced_in_order(self):
        fault = FaultyOs()
        done, _, _, _, _ = self.attempt(fault)
        self.assertTrue(done)
        store = os.path.join(self.path, 'store')
        made = [(i, what) for i, (how, what) in enumerate(fault.log)
                if how == 'link' and what.startswith(store)]
        files = [what for _, what in made if os.path.isfile(what)]
        self.assertEqual(len(files), 2)         # a segment and a log entry
        self.assertIn('/seg/', files[0])
        self.assertIn('/log/', files[1])
        entry_linked = fault.log.index(('link', files[1]))
        for i, what in made:
            above = os.stat(os.path.dirname(what)).st_ino
            synced = fault.log.index(('fsync', above), i)
            if '/seg/' in what:
                self.assertLess(synced, entry_linked)
        for what in files:
            itself = fault.log.index(('fsync', os.stat(what).st_ino))
            self.assertLess(itself, fault.log.index(('link', what)))


class Verbs(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.store = tarsnapd.Server(self.path).store
        self.addCleanup(setattr, tarsnapd, 'os', os)

    def test_put_is_if_absent(self):
        self.assertTrue(self.store.put('a/b/c', b'one'))
        self.assertFalse(self.store.put('a/b/c', b'two'))
        self.assertEqual(self.store.get('a/b/c'), b'one')
        self.assertEqual(self.store.size('a/b/c'), 3)
        self.assertEqual(self.store.get('a/b/c', 1, 2), b'ne')
        self.assertEqual(self.store.list('a/'), ['a/b/c'])
        self.store.delete('a/b/c')
        self.store.delete('a/b/c')
        self.assertIsNone(self.store.size('a/b/c'))
        self.assertEqual(self.store.list('a/b'), [])
        with self.assertRaises(tarsnapd.NoObject):
            self.store.get('a/b/c')

    def test_what_the_dead_made_is_durable_when_it_is_read(self):
        """Linked, but not synced: neither its name nor those above it."""
        made = tarsnapd.FileStore(self.store.root, self.store.temporary)
        made.put('log/1/0/001', b'entry')
        place = os.path.join(self.store.root, 'log', '1', '0')
        above = [os.stat(path).st_ino for path in (
            place, os.path.dirname(place), os.path.join(
                self.store.root, 'log'), self.store.root)]
        for kind, young in ('young', 600), ('old', 0):
            with self.subTest(kind):
                seen = FaultyOs()
                store = tarsnapd.FileStore(self.store.root,
                                           self.store.temporary)
                with mock.patch.object(tarsnapd, 'os', seen), \
                        mock.patch.object(tarsnapd, 'YOUNG', young):
                    for _ in range(2):
                        self.assertEqual(store.get('log/1/0/001'), b'entry')
                self.assertEqual([ino for what, ino in seen.log
                                  if what == 'fsync'], above if young else [])
        # One fsync is for all of a directory that were there before.
        made.put('log/1/0/002', b'another')
        seen, later = FaultyOs(), time.time() + 5
        store = tarsnapd.FileStore(self.store.root, self.store.temporary)
        with mock.patch.object(tarsnapd, 'os', seen), \
                mock.patch.object(tarsnapd.time, 'time', lambda: later):
            store.get('log/1/0/002')
            store.get('log/1/0/001')
        self.assertEqual(len(seen.log), len(above))
        # What this one put is: once is enough.
        seen = FaultyOs()
        with mock.patch.object(tarsnapd, 'os', seen):
            made.get('log/1/0/001')
        self.assertEqual(seen.log, [])
        # If that cannot be, nobody is told what there is.
        broken = FaultyOs(1)
        with mock.patch.object(tarsnapd, 'os', broken), \
                self.assertRaises(tarsnapd.StoreError) as caught:
            tarsnapd.FileStore(self.store.root, self.store.temporary
                               ).get('log/1/0/001')
        self.assertEqual(str(caught.exception),
                         'sync log/1/0/001: Input/output error')

    def test_a_short_object_is_damage(self):
        self.store.put('a', b'12345')
        with self.assertRaises(tarsnapd.Damaged) as caught:
            self.store.get('a', 2, 10)
        self.assertIn('a: short read (3 of 10)', str(caught.exception))

    def test_without_hard_links(self):
        for code in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            class NoLinks(FaultyOs):
                def link(self, source, target):
                    raise OSError(code, os.strerror(code))
            tarsnapd.os = NoLinks()
            key = 'x/%d' % code
            self.assertTrue(self.store.put(key, b'one'))
            self.assertFalse(self.store.put(key, b'two'))
            self.assertEqual(self.store.get(key), b'one')
            self.assertEqual(os.listdir(os.path.join(self.path, 'tmp')), [])

    def test_a_whole_backup_without_hard_links(self):
        class NoLinks(FaultyOs):
            def link(self, source, target):
                raise OSError(errno.EPERM, 'no links here')
        tarsnapd.os = NoLinks()
        client = Client(Embedded(self.path))
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        _, _, names = host.backup(client, 'one')
        self.assertNotIn('NOBLOCK', get(client, names))
        client.close()

    def test_without_hard_links_the_first_wins(self):
        class Slow(FaultyOs):
            def link(self, source, target):
                with open(target, 'x') as file:     # somebody is faster
                    file.write('other')
                raise OSError(errno.EPERM, 'no links here')
        tarsnapd.os = Slow()
        self.assertFalse(self.store.put('a', b'mine'))
        self.assertEqual(self.store.get('a'), b'other')

    def test_link_that_lost_its_answer(self):
        # NFS: the first call worked, its repetition says EEXIST.
        class Repeats(FaultyOs):
            def link(self, source, target):
                os.link(source, target)
                raise FileExistsError(errno.EEXIST, 'exists')
        tarsnapd.os = Repeats()
        self.assertTrue(self.store.put('a', b'mine'))

    def test_one_of_many_wins(self):
        import threading
        wins = []

        def race(i):
            for j in range(20):
                if self.store.put('race/%d' % j, b'%d' % i):
                    wins.append((j, i))
        threads = [threading.Thread(target=race, args=(i,))
                   for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(j for j, _ in wins), list(range(20)))
        for j, i in wins:
            self.assertEqual(self.store.get('race/%d' % j), b'%d' % i)

    def test_temporaries_of_the_dead_are_swept(self):
        tmp = os.path.join(self.path, 'tmp')
        host = os.uname().nodename
        dead = '%s+%d+x-1' % (host, 2 ** 22 - 1)
        mine = '%s+%d+x-1' % (host, os.getpid())
        far = 'elsewhere+%d+x-1' % (2 ** 22 - 1)
        for name in (dead, mine, far):
            with open(os.path.join(tmp, name), 'w'):
                pass
        tarsnapd.Server(self.path)
        self.assertEqual(sorted(os.listdir(tmp)), sorted([mine, far]))

    def test_damaged_segment_is_named_and_others_are_served(self):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        _, _, lost = host.backup(client, 'one')
        _, _, names = host.backup(client, 'two')
        segments = self.store.list('seg/')
        entry = tarsnapd.log_decode(host.machine, 1, self.store.get(
            tarsnapd.log_key(host.machine, 1)))
        self.assertIn(entry.segments[0][0], segments)
        self.store.delete(entry.segments[0][0])
        found = get(client, [lost[0], names[0], lost[1]])
        self.assertEqual(found[0::2], ['NOBLOCK'] * 2)
        self.assertEqual(found[1], block('c', 'two-0', 1000)[2])

    def test_an_index_without_room_says_so(self):
        # SQLite takes the transaction back by itself before it says so.
        client = Client(Embedded(self.path))
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        host.backup(client, 'one')
        client.close()
        server = tarsnapd.Server(self.path)
        self.addCleanup(server.close)
        server.perform(('index', host.machine, 'reset'))
        index = server.indexes.open[host.machine]

        class Full:
            def __init__(self, db):
                self.db = db

            def __getattr__(self, name):
                return getattr(self.db, name)

            def execute(self, sql, *args):
                if sql == 'COMMIT':
                    self.db.execute('ROLLBACK')
                    raise sqlite3.OperationalError('database is full')
                return self.db.execute(sql, *args)

        index.db = Full(index.db)
        with self.assertRaisesRegex(tarsnapd.StoreError, 'is full'):
            server.run(tarsnapd.catch_up(host.machine))
        index.db = index.db.db
        server.run(tarsnapd.catch_up(host.machine))
        self.assertEqual(server.perform(('index', host.machine,
                                         'state')).n, 1)

    def test_receive_times_never_go_back(self):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        server = client.link.local.server
        clock = [2000, 1000, 3000]
        perform = server.perform_here
        server.perform_here = lambda wish: (
            clock[0] if wish[0] == 'now' else perform(wish))
        times = []
        for label in ('one', 'two', 'three'):
            host.backup(client, label)
            clock.append(clock.pop(0))
            changes = client.stream('CHANGES', u64(host.n - 1) + bytes(33))
            times.append(int.from_bytes(changes[0][1][:8], 'big'))
        self.assertEqual(times, [2000, 2000, 3000])


if __name__ == '__main__':
    unittest.main()
