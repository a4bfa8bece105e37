# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Every rule a commit must pass, each with a commit that breaks only it."""

import os
import unittest
from unittest import mock

from rawclient import (
    ABORT_KIND, COMPLETE, D, DELETE_KIND, N, NONE, NUKE_KIND, OPEN, PARTIAL,
    R, W, ZERO, Client, Embedded, Error, Host, added, block, get, names_body,
    put, refs_view, server_directory, sha, tarsnapd, u16, u64)

LINEAGE = b'lineage of these'
OTHER = b'another lineage!'


class Commits(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.client = self.connect()
        self.host = Host(self.client)
        self.client.auth(self.host.machine, self.host.keys, R, W, D, N)

    def connect(self, host=None):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        if host:
            client.auth(host.machine, host.keys, R, W, D, N)
        return client

    def check_refused(self, code, call, *args, **kwargs):
        with self.assertRaises(Error) as caught:
            call(*args, **kwargs)
        self.assertEqual(caught.exception.code, code, caught.exception)

    def begin(self, label='x', **what):
        """A write transaction with two chunks and a record."""
        tid = os.urandom(16)
        self.host.begin(self.client, tid, lineage=LINEAGE, **what)
        names = [put(self.client, block('c', label + '1')),
                 put(self.client, block('c', label + '2')),
                 put(self.client, block('a', label))]
        return tid, names

    def link(self, names, label='x', state=COMPLETE, lineage=LINEAGE):
        return [(sha(label.encode()), names[-1], lineage, state)]

    def head(self):
        return self.client.call('STAT')[1][:40]

    def check_bad(self, code, tid, **what):
        """The commit is refused, and nothing has changed."""
        before = self.head()
        self.check_refused(code, self.client.call, 'COMMIT',
                     self.host.build(tid, **what))
        self.assertEqual(self.head(), before)

    def test_blocks_are_not_stored_before_the_commit_and_are_after(self):
        tid, names = self.begin()
        self.assertEqual(get(self.client, names), ['NOBLOCK'] * 3)
        bitmap = self.client.call('HAS', names_body(names))[1]
        self.assertEqual(bitmap, b'\0')
        self.host.commit(self.client, tid, puts=names,
                         linked=self.link(names))
        self.assertEqual(get(self.client, names),
                         [block('c', 'x1')[2], block('c', 'x2')[2],
                          block('a', 'x')[2]])
        bitmap = self.client.call('HAS', names_body(names + [ZERO]))[1]
        self.assertEqual(bitmap, b'\7')

    def test_refs_view_is_the_prefix(self):
        archive, record, names = self.host.backup(self.client, 'x')
        self.assertEqual(get(self.client, [record, names[0]], mask=1),
                         [refs_view(block('a', 'x')[2]), 'ROLE'])

    def test_signature_machine_and_kind(self):
        tid, names = self.begin()
        good = self.host.build(tid, puts=names, linked=self.link(names))
        bad = bytearray(good)
        bad[-1] ^= 1
        self.check_refused('ROLE', self.client.call, 'COMMIT', bytes(bad))
        self.check_bad('ROLE', tid, puts=names, sign=D,
                        linked=self.link(names))
        self.check_refused('BAD', self.client.call, 'NUKE', good)

    def test_a_commit_of_another_machine_is_malformed(self):
        tid, names = self.begin()
        self.host.machine ^= 1
        commit = self.host.build(tid, puts=names)
        self.check_refused('BAD', self.client.call, 'COMMIT', commit)

    def test_base(self):
        tid, names = self.begin()
        link = self.link(names)
        self.check_bad('RESYNC', tid, puts=names, linked=link, n=2)
        self.check_bad('CONFLICT', tid, puts=names, linked=link,
                        previous=sha(b'other'))
        self.host.commit(self.client, tid, puts=names, linked=link)
        self.check_refused('RESYNC', self.host.begin, self.client,
                     os.urandom(16), n=7)
        self.check_refused('RESYNC', self.host.begin, self.client,
                     os.urandom(16), head=sha(b'other'))

    def test_the_slower_of_two_clients_gets_conflict(self):
        tid, names = self.begin()
        second = self.connect(self.host)
        self.host.copy().backup(second, 'faster')
        self.check_refused('CONFLICT', self.host.commit, self.client, tid,
                     puts=names, linked=self.link(names))
        # On the new base the same transaction is good, nothing is sent again.
        changes = self.client.stream('CHANGES', u64(0) + ZERO + b'\0')
        self.host.n, self.host.head = 1, sha(changes[0][1][8:])
        listed = self.client.stream('LIST', u16(0))
        row = listed[1][1][2:]
        self.host.archives[row[:32]] = (row[32:64], row[64:80], row[80])
        self.host.commit(self.client, tid, puts=names,
                         linked=self.link(names))
        self.assertEqual(self.head()[:8], u64(2))

    def test_a_repeated_commit_gets_the_first_answer(self):
        tid, names = self.begin()
        commit = self.host.build(tid, puts=names, linked=self.link(names))
        first = self.client.call('COMMIT', commit)
        self.assertEqual(self.client.call('COMMIT', commit), first)
        late = self.connect(self.host)
        self.assertEqual(late.call('COMMIT', commit), first)
        other = self.host.build(tid, puts=names, linked=self.link(names),
                                note=b'not the same')
        self.check_refused('CONFLICT', late.call, 'COMMIT', other)
        self.assertEqual(self.head()[:8], u64(1))

    def test_puts_must_be_those_received(self):
        tid, names = self.begin()
        link = self.link(names)
        self.check_bad('MISMATCH', tid, puts=names[1:], linked=link)
        self.check_bad('MISMATCH', tid, puts=names + [ZERO], linked=link)
        self.check_bad('MISMATCH', tid, puts=names[::-1], linked=link)
        self.host.commit(self.client, tid, puts=names, linked=link)

    def test_withdrawn_puts_are_left_out(self):
        tid, names = self.begin()
        self.client.send('WITHDRAW', names_body(names[:1]))
        self.check_bad('MISMATCH', tid, puts=names,
                        linked=self.link(names))
        self.host.commit(self.client, tid, puts=names[1:],
                         linked=self.link(names))
        self.assertEqual(get(self.client, names[:1]), ['NOBLOCK'])
        rows = added(self.client.stream('CHANGES', u64(0) + ZERO + b'\1'))
        self.assertEqual([row[0] for row in rows], names[1:])

    def test_a_withdrawn_name_may_be_put_again(self):
        tid, names = self.begin()
        self.client.send('WITHDRAW', names_body(names[:1]))
        put(self.client, block('c', 'x1'))
        puts = names[1:] + names[:1]
        self.host.commit(self.client, tid, puts=puts,
                         linked=self.link(names))
        self.assertEqual(get(self.client, names[:1]),
                         [block('c', 'x1')[2]])

    def test_first_copy_wins(self):
        self.host.backup(self.client, 'one')
        tid = os.urandom(16)
        self.host.begin(self.client, tid)
        name = block('c', 'one-0')[0]
        again = put(self.client, (name,) + block('c', 'other bytes')[1:])
        twice = [put(self.client, block('c', 'twice')) for _ in range(2)]
        record = put(self.client, block('a', 'two'))
        self.host.commit(self.client, tid, puts=[again] + twice + [record],
                         linked=self.link([record]))
        self.assertEqual(get(self.client, [name]),
                         [block('c', 'one-0', 1000)[2]])
        self.assertEqual(self.client.call('STAT')[1][48:56], u64(4 + 2))

    def test_an_archive_that_exists(self):
        tid, names = self.begin()
        self.host.commit(self.client, tid, puts=names,
                         linked=self.link(names))
        self.check_refused('EXISTS', self.begin, ids=[sha(b'x')])
        tid, names = self.begin('y')
        self.check_bad('EXISTS', tid, puts=names,
                        linked=self.link(names, 'x'))

    def test_an_archive_needs_its_record(self):
        tid, names = self.begin()
        chunk = [(sha(b'x'), names[0], LINEAGE, COMPLETE)]
        self.check_bad('NOBLOCK', tid, puts=names, linked=chunk)
        self.check_bad('NOBLOCK', tid, puts=names,
                        linked=[(sha(b'x'), ZERO, LINEAGE, COMPLETE)])

    def test_live_must_match(self):
        tid, names = self.begin()
        self.check_bad('MISMATCH', tid, puts=names, live=NONE,
                        linked=self.link(names))

    def checkpoint(self, lineage=LINEAGE):
        """An open archive in a transaction that goes on."""
        tid, names = self.begin()
        self.host.commit(self.client, tid, frame='CHECKPOINT', puts=names,
                         linked=self.link(names, 'part', OPEN, lineage))
        return tid, (sha(b'part'), names[-1])

    def finish(self, label='y'):
        names = [put(self.client, block('a', label))]
        return names, self.link(names)

    def test_a_checkpoint_is_replaced_by_its_own_lineage(self):
        tid, part = self.checkpoint()
        names, link = self.finish()
        self.host.commit(self.client, tid, puts=names, linked=link,
                         unlinked=[part])
        listed = self.client.stream('LIST', u16(0))
        self.assertEqual(listed[1][1][:34], u16(1) + sha(b'x'))

    def test_write_unlinks_no_other_lineage(self):
        tid, part = self.checkpoint(OTHER)
        names, link = self.finish()
        self.check_bad('NOARCHIVE', tid, puts=names, linked=link,
                        unlinked=[part])

    def test_write_unlinks_nothing_complete(self):
        archive, record, _ = self.host.backup(self.client, 'done')
        tid, names = self.begin()
        self.check_bad('NOARCHIVE', tid, puts=names,
                        linked=self.link(names), unlinked=[(archive, record)])

    def test_an_open_archive_becomes_partial_for_good(self):
        tid, part = self.checkpoint(OTHER)
        keep = [part + (OTHER, PARTIAL)]
        wrong = [part + (LINEAGE, PARTIAL)]
        self.check_bad('NOARCHIVE', tid, linked=wrong, unlinked=[part])
        self.host.commit(self.client, tid, linked=keep, unlinked=[part])
        for lineage in (LINEAGE, OTHER):
            tid = os.urandom(16)
            self.host.begin(self.client, tid, lineage=lineage)
            self.check_bad('NOARCHIVE', tid, unlinked=[part])
            self.client.call('ABORT')
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        self.host.commit(self.client, tid, kind=DELETE_KIND,
                         unlinked=[part])

    def test_delete(self):
        archive, record, names = self.host.backup(self.client, 'one')
        self.host.backup(self.client, 'two')
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        gone = names + [record]
        self.client.send('DELETE', names_body(gone))
        what = dict(kind=DELETE_KIND, unlinked=[(archive, record)])
        self.check_bad('MISMATCH', tid, deletes=names, **what)
        self.check_bad('NOARCHIVE', tid, deletes=gone, kind=DELETE_KIND,
                        unlinked=[(archive, ZERO)])
        self.check_bad('MISMATCH', tid, deletes=gone, kind=DELETE_KIND)
        self.host.commit(self.client, tid, deletes=gone, **what)
        self.assertEqual(get(self.client, gone), ['NOBLOCK'] * 4)
        answers = self.client.stream('CHANGES', u64(2) + ZERO + b'\1')
        removed = [body[2:] for kind, body in answers if kind == 'REMOVED']
        self.assertEqual(removed, [b''.join(sorted(gone))])

    def test_deleting_what_is_not_live(self):
        self.host.backup(self.client, 'one')
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        self.client.send('DELETE', names_body([ZERO]))
        self.check_bad('MISMATCH', tid, kind=DELETE_KIND, deletes=[ZERO])

    def test_a_delete_begins_with_nothing(self):
        _, _, names = self.host.backup(self.client, 'one')
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        self.client.send('DELETE', names_body(names[:2]))
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        self.client.send('DELETE', names_body(names[2:]))
        self.host.commit(self.client, tid, kind=DELETE_KIND,
                         deletes=names[2:])

    def test_a_deleted_block_may_come_back(self):
        _, _, names = self.host.backup(self.client, 'one')
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        self.client.send('DELETE', names_body(names[:1]))
        self.host.commit(self.client, tid, kind=DELETE_KIND,
                         deletes=names[:1])
        tid = os.urandom(16)
        self.host.begin(self.client, tid)
        put(self.client, block('c', 'one-0', 1000))
        self.host.commit(self.client, tid, puts=names[:1])
        self.assertEqual(get(self.client, names[:1]),
                         [block('c', 'one-0', 1000)[2]])

    def test_nuke(self):
        _, _, names = self.host.backup(self.client, 'one')
        bad = self.host.build(ZERO[:16], kind=NUKE_KIND, live=sha(b'x'))
        self.check_refused('MISMATCH', self.client.call, 'NUKE', bad)
        self.host.commit(self.client, ZERO[:16], frame='NUKE',
                         kind=NUKE_KIND)
        self.assertEqual(get(self.client, names), ['NOBLOCK'] * 3)
        self.assertEqual(self.client.call('STAT')[1][40:], bytes(28))
        # Numbers go on, and the machine is as good as new.
        _, _, names = self.host.backup(self.client, 'one')
        self.assertEqual(get(self.client, names[:1]),
                         [block('c', 'one-0', 1000)[2]])
        self.assertEqual(self.head()[:8], u64(3))

    def test_abort_commit_takes_the_number(self):
        tid, names = self.begin()
        undecided = self.host.build(tid, puts=names,
                                    linked=self.link(names))
        self.host.commit(self.client, tid, kind=ABORT_KIND)
        self.check_refused('CONFLICT', self.client.call, 'COMMIT', undecided)
        self.assertEqual(self.host.begin(self.client, tid)[0], 0)

    def close_segment(self, client):
        """What was put becomes an object, not yet committed."""
        with mock.patch.dict(tarsnapd.LIMIT, {'segment': 1}):
            client.link.local.idle()

    def second_server(self):
        """A Client at another server of the same store."""
        self.second = self.path + '-second'
        tarsnapd.server_create(self.second, {
            'store': os.path.join(self.path, 'store')})
        other = Client(Embedded(self.second))
        self.addCleanup(other.close)
        other.auth(self.host.machine, self.host.keys, R, W, D, N)
        return other

    def test_two_servers_use_no_key_for_two_contents(self):
        """Not even after one of them has aborted and deleted its own."""
        tid, names = self.begin()
        other = self.second_server()
        self.host.begin(other, tid, lineage=LINEAGE)
        put(other, block('c', 'y'))
        keys = {}
        real = tarsnapd.FileStore.put

        def noting(store, key, data):
            if key.startswith('seg/'):
                with open(data, 'rb') as file:
                    keys.setdefault(key, set()).add(sha(file.read()))
            return real(store, key, data)

        with mock.patch.object(tarsnapd.FileStore, 'put', noting):
            self.close_segment(other)
            other.call('ABORT')
            self.close_segment(self.client)
        self.assertEqual(sorted(map(len, keys.values())), [1, 1])
        self.host.commit(self.client, tid, puts=names, linked=self.link(names))
        self.assertEqual(get(self.client, names), [
            block('c', 'x1')[2], block('c', 'x2')[2], block('a', 'x')[2]])

    def test_a_dropped_segment_is_expired(self):
        """Dropped and deleted by another server's cleaner."""
        tid, names = self.begin()
        self.close_segment(self.client)
        self.second_server()
        server = tarsnapd.Server(self.second)
        self.addCleanup(server.close)
        policy = tarsnapd.Policy()
        policy.abandon = True
        for dropped, deleted in (1, 0), (0, 1):
            done = tarsnapd.Cleaned()
            server.run(tarsnapd.clean(self.host.machine, policy, done))
            self.assertEqual((done.dropped, done.deleted), (dropped, deleted))
        self.check_bad('EXPIRED', tid, puts=names, linked=self.link(names))
        # Sent again, it is as good as new.
        self.host.begin(self.client, tid, lineage=LINEAGE)
        names = [put(self.client, block('a', 'x'))]
        self.host.commit(self.client, tid, puts=names, linked=self.link(names))

    def test_abort_of_what_another_server_has_committed(self):
        """It deletes no segment the log has not dropped (rule 5)."""
        tid, names = self.begin()
        self.close_segment(self.client)
        other = self.second_server()
        self.host.begin(other, tid, lineage=LINEAGE)
        self.host.commit(other, tid, puts=names, linked=self.link(names))
        self.host.commit(self.client, tid, kind=ABORT_KIND)
        self.assertEqual(get(other, names), [
            block('c', 'x1')[2], block('c', 'x2')[2], block('a', 'x')[2]])

    def test_abort_forgets(self):
        tid, names = self.begin()
        self.client.link.local.idle()
        self.assertEqual(self.client.call('ABORT')[0], 'OK')
        self.assertEqual(self.host.begin(self.client, tid),
                         (0, NONE, []))
        self.check_refused('EXPIRED', self.connect(self.host).call, 'ABORT')

    def test_five_transactions(self):
        clients = [self.connect(self.host) for _ in range(5)]
        # One process, one table: embedded sessions have one each.
        for client in clients[1:]:
            client.link.local.session.server = (
                clients[0].link.local.session.server)
        tids = [os.urandom(16) for _ in clients]
        for client, tid in zip(clients[:4], tids):
            self.host.begin(client, tid)
        self.check_refused('BUSY', self.host.begin, clients[4], tids[4])
        clients[0].call('ABORT')
        self.host.begin(clients[4], tids[4])
        self.check_refused('BUSY', self.host.begin, clients[4], tids[3])


if __name__ == '__main__':
    unittest.main()
