# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Cleaning gives space back and loses nothing, whatever happens meanwhile."""

import os
import unittest
from unittest import mock

from rawclient import (
    D, DELETE_KIND, N, R, W, Client, Embedded, Host, block, get, names_body,
    server_directory, tarsnapd)


def size_on_disk(path):
    """Bytes of all files below `path`."""
    return sum(os.path.getsize(os.path.join(where, name))
               for where, _, names in os.walk(path) for name in names)


class Case(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.store = os.path.join(self.path, 'store')
        self.client = self.connect()
        self.host = Host(self.client)
        self.client.auth(self.host.machine, self.host.keys, R, W, D, N)
        self.archives = {}          # label -> (archive id, record, names)
        fsync = mock.patch.object(os, 'fsync', lambda fd: None)
        fsync.start()
        self.addCleanup(fsync.stop)

    def connect(self, host=None):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        if host:
            client.auth(host.machine, host.keys, R, W, D, N)
        return client

    def server(self):
        server = tarsnapd.Server(self.path)
        self.addCleanup(server.close)
        return server

    def backup(self, label, blocks=4, size=10000):
        self.archives[label] = self.host.backup(self.client, label, blocks,
                                                size)

    def delete(self, *labels, keep=0):
        """Delete archives, but the first `keep` chunks of each."""
        gone, unlinked = [], []
        for label in labels:
            archive, record, names = self.archives.pop(label)
            unlinked.append((archive, record))
            gone += [record] + names[keep:]
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        for i in range(0, len(gone), 1000):
            self.client.send('DELETE', names_body(gone[i:i + 1000]))
        self.host.commit(self.client, tid, kind=DELETE_KIND, deletes=gone,
                         unlinked=unlinked)

    def clean(self, server=None, **policy):
        """One round; what it did."""
        done, rules = tarsnapd.Cleaned(), tarsnapd.Policy()
        for name, value in policy.items():
            self.assertTrue(hasattr(rules, name))
            setattr(rules, name, value)
        server = server or self.server()
        server.run(tarsnapd.clean(self.host.machine, rules, done))
        return done

    def check_readable(self, client=None):
        """Every block of every archive is what was put."""
        for label, (_, record, names) in self.archives.items():
            wanted = [block('c', '%s-%d' % (label, i), self.size)[2]
                      for i in range(len(names))]
            self.assertEqual(get(client or self.client, names), wanted)
            self.assertEqual(get(client or self.client, [record]),
                             [block('a', label)[2]])

    size = 10000


class Space(Case):

    def test_space_comes_back_in_the_second_round(self):
        for i in range(8):
            self.backup('a%d' % i, 20)
        full = size_on_disk(self.store)
        self.delete(*('a%d' % i for i in range(7)), keep=2)
        done = self.clean()
        self.assertEqual(done.dropped, 7)
        self.assertGreater(size_on_disk(self.store), full)
        self.check_readable()
        done = self.clean()
        self.assertEqual(done.deleted, 7)
        self.assertLess(size_on_disk(self.store), full / 8 + 14 * 13000)
        self.check_readable()
        self.assertEqual(self.clean().dropped, 0)
        kept = [block('c', 'a%d-%d' % (i, j))[0]
                for i in range(7) for j in range(2)]
        self.assertNotIn('NOBLOCK', get(self.client, kept))


if __name__ == '__main__':
    unittest.main()
