# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A transaction survives its connection, its server, and a torn spool."""

import os
import socket
import unittest

from rawclient import (
    COMPLETE, R, W, Client, Error, Host, Serve, Stdio, block, get,
    names_body, put, server_directory, sha, tarsnapd)


class Resume(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.serve = None
        self.start()
        self.addCleanup(lambda: self.serve.kill() if self.serve else None)
        client = self.connect()
        self.host = Host(client, user='joe', password=b'pw')
        client.close()
        self.tid = os.urandom(16)

    def start(self, *options):
        self.serve = Serve(self.path, *options)

    def connect(self):
        client = self.serve.client()
        self.addCleanup(client.close)
        if hasattr(self, 'host'):
            client.auth(self.host.machine, self.host.keys, R, W)
        return client

    def crash(self):
        self.serve.kill()
        self.start()

    def put_some(self, client, first, count, size=50000):
        return [put(client, block('c', 'r%d' % i, size))
                for i in range(first, first + count)]

    def check_finish(self, client, names):
        record = put(client, block('a', 'done'))
        self.host.commit(client, self.tid, puts=names + [record],
                         linked=[(sha(b'x'), record, bytes(16), COMPLETE)])
        self.assertEqual(get(client, names[-1:])[0][:2], b'\1c')

    def test_kill_in_mid_transaction(self):
        client = self.connect()
        self.host.begin(client, self.tid)
        names = self.put_some(client, 0, 100)
        client.wait_received(100)
        self.crash()
        client = self.connect()
        count, digest, rows = self.host.begin(client, self.tid)
        self.assertEqual((count, digest), (100, sha(b''.join(names))))
        length = len(block('c', 'r0', 50000)[2])
        self.assertEqual(rows, [(name, b'c', length) for name in names])
        names += self.put_some(client, 100, 10)
        self.check_finish(client, names)

    def test_kill_after_segments_were_closed(self):
        client = self.connect()
        self.host.begin(client, self.tid)
        names = self.put_some(client, 0, 150, 280000)
        client.send('WITHDRAW', names_body(names[3:5]))
        client.wait_received(151)
        self.crash()
        del names[3:5]
        client = self.connect()
        count, digest, _ = self.host.begin(client, self.tid)
        self.assertEqual((count, digest), (148, sha(b''.join(names))))
        stored = os.listdir(os.path.join(
            self.path, 'store', 'seg', '%016x' % self.host.machine,
            self.tid.hex()))
        self.assertEqual([x[:7] for x in stored], ['000001-'])
        self.check_finish(client, names)

    def test_a_checkpoint_is_not_held_again(self):
        client = self.connect()
        self.host.begin(client, self.tid)
        names = self.put_some(client, 0, 10)
        self.host.commit(client, self.tid, frame='CHECKPOINT', puts=names)
        more = self.put_some(client, 10, 5)
        client.wait_received(15)
        self.crash()
        client = self.connect()
        count, digest, _ = self.host.begin(client, self.tid)
        self.assertEqual((count, digest), (5, sha(b''.join(more))))
        self.check_finish(client, more)

    def spool(self):
        directory = os.path.join(self.path, 'spool',
                                 '%016x' % self.host.machine)
        return os.path.join(directory, self.tid.hex() + '-000001')

    def check_torn(self, damage):
        """Put ten, kill, damage the spool; what BEGIN then finds."""
        client = self.connect()
        self.host.begin(client, self.tid)
        names = self.put_some(client, 0, 10)
        client.wait_received(10)
        self.serve.kill()
        with open(self.spool(), 'r+b') as file:
            damage(file)
        self.start()
        client = self.connect()
        count, digest, _ = self.host.begin(client, self.tid)
        self.assertEqual(digest, sha(b''.join(names[:count])))
        names = names[:count] + self.put_some(client, 20, 1)
        self.check_finish(client, names)
        return count

    def test_a_spool_cut_short(self):
        self.assertEqual(self.check_torn(lambda file: file.truncate(
            os.fstat(file.fileno()).st_size - 7)), 9)

    def test_a_spool_with_garbage_at_the_end(self):
        self.assertEqual(self.check_torn(lambda file: (
            file.seek(0, 2), file.write(b'tse1c' + bytes(300)))), 10)

    def test_a_spool_with_a_flipped_bit(self):
        def flip(file):
            file.seek(200000)
            byte = file.read(1)[0]
            file.seek(200000)
            file.write(bytes([byte ^ 4]))
        self.assertEqual(self.check_torn(flip), 3)

    def test_an_empty_spool(self):
        self.assertEqual(self.check_torn(lambda file: file.truncate(0)), 0)

    def test_a_spool_that_is_already_an_object(self):
        client = self.connect()
        self.host.begin(client, self.tid)
        names = self.put_some(client, 0, 10)
        client.wait_received(10)
        self.serve.kill()
        # The server died between link() and unlink(): one inode, two names.
        spool = tarsnapd.SpoolDir(os.path.join(self.path, 'spool')).open(
            self.host.machine, self.tid)
        spool.scan([], True)
        path, segment = spool.finish()
        key = tarsnapd.segment_key(self.host.machine, self.tid, 1,
                                   segment.table_hash)
        target = os.path.join(self.path, 'store', key)
        os.makedirs(os.path.dirname(target))
        os.link(path, target)
        os.close(spool.lock)
        with open(target, 'rb') as file:
            before = file.read()
        self.start()
        client = self.connect()
        count, digest, _ = self.host.begin(client, self.tid)
        self.assertEqual((count, digest), (10, sha(b''.join(names))))
        self.check_finish(client, names + self.put_some(client, 50, 1))
        with open(target, 'rb') as file:
            self.assertEqual(file.read(), before)

    def test_taken_over_by_another_connection(self):
        old = self.connect()
        self.host.begin(old, self.tid)
        names = self.put_some(old, 0, 10)
        old.wait_received(10)
        new = self.connect()
        count, digest, _ = self.host.begin(new, self.tid)
        self.assertEqual((count, digest), (10, sha(b''.join(names))))
        put(old, block('c', 'late'))
        with self.assertRaises(Error) as caught:
            old.next()
        self.assertEqual(caught.exception.code, 'EXPIRED')
        self.check_finish(new, names)

    def test_taken_over_from_another_process(self):
        self.serve.kill()
        self.start('--workers', '3')
        clients = [self.connect() for _ in range(6)]
        names = []
        for i, client in enumerate(clients):
            count, digest, _ = self.host.begin(client, self.tid)
            self.assertEqual((count, digest), (i, sha(b''.join(names))))
            names += self.put_some(client, i, 1)
            client.wait_received(1)
        self.check_finish(clients[-1], names)
        self.assertEqual(self.serve.stop()[0], 0)
        self.serve = None

    def test_a_lost_connection_keeps_what_arrived(self):
        client = self.connect()
        self.host.begin(client, self.tid)
        names = self.put_some(client, 0, 10)
        client.call('STAT')     # all of it has arrived
        client.link.sock.shutdown(socket.SHUT_RDWR)
        client = self.connect()
        count, digest, _ = self.host.begin(client, self.tid)
        self.assertEqual((count, digest), (10, sha(b''.join(names))))

    def test_a_wish_that_was_granted_is_forgotten(self):
        spools = tarsnapd.SpoolDir(os.path.join(self.path, 'spool'))
        spools.want(self.host.machine, self.tid)
        spool = spools.open(self.host.machine, self.tid)
        self.assertFalse(spool.wanted())
        spools.want(self.host.machine, self.tid)
        self.assertTrue(spool.wanted())
        spool.close()

    def test_two_processes_never_share_a_transaction(self):
        link = Stdio(self.path)
        other = Client(link)
        other.auth(self.host.machine, self.host.keys, W)
        self.host.begin(other, self.tid)
        names = self.put_some(other, 0, 3)
        other.wait_received(3)
        client = self.connect()
        count, digest, _ = self.host.begin(client, self.tid)
        self.assertEqual((count, digest), (3, sha(b''.join(names))))
        put(other, block('c', 'late'))
        with self.assertRaises(Error) as caught:
            other.next()
        self.assertEqual(caught.exception.code, 'EXPIRED')
        self.assertEqual(link.close(), 0)


if __name__ == '__main__':
    unittest.main()
