# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Rot is named and costs what it hits: a seeded share of tests/rot.py."""

import os
import unittest
from unittest import mock

import rot
import s3peers
import tarsnapd
import world
from test_s3_store import environment


class Files(unittest.TestCase):

    def setUp(self):
        self.seed = world.seed_choose('rot')

    def test_parts_of_all_objects(self):
        """Of each kind of object and part, and each harm, one."""
        store, seen, cost = rot.Store(self, self.seed), set(), 0
        for case in store.cases():
            kind = case.key.split('/')[0], case.part.split()[0] + \
                case.part.split()[-1]
            if case.harm != 'flip':
                kind = kind[0] in ('seg', 'log'), case.harm
            if kind not in seen:
                seen.add(kind)
                with self.subTest(case):
                    cost += store.check(case)
        self.assertGreater(len(seen), 25)
        self.assertGreater(cost, 0)

    def test_what_is_not_in_the_store(self):
        """Its own files: one line that names the file, and nothing served."""
        store = rot.Store(self, self.seed)
        for name in ('identity.key', 'tarsnapd.conf'):
            path = os.path.join(store.lab.store, name)
            with open(path, 'rb') as file:
                data = file.read()
            for bad in (b'', data[:10], b'#' + data[1:-9].replace(
                    b'listen', b'lasten').replace(b'KEY', b'KAY')):
                with open(path, 'wb') as file:
                    file.write(bad)
                with self.assertRaisesRegex(tarsnapd.ServerError, name):
                    tarsnapd.Server(store.lab.store)
                result = store.host.run('--list-archives', cache=False)
                self.assertEqual(result.status, 1)
                self.assertIn(name, result.err)
            with open(path, 'wb') as file:
                file.write(data)
        store.host.good('--fsck')
        # An id is made once.
        os.unlink(os.path.join(store.lab.store, 'store', 'store-id'))
        with self.assertRaisesRegex(tarsnapd.ServerError,
                                    'store-id is missing'):
            tarsnapd.server_create(store.lab.store)


class Bucket(unittest.TestCase):

    def test_a_few(self):
        seed = world.seed_choose('rot in a bucket')
        peer = s3peers.Moto()
        self.addCleanup(peer.close)
        with environment(peer.environment()):
            store, seen = rot.BucketStore(self, seed, peer), set()
            for case in store.cases():
                kind = case.key.split('/')[0]
                if kind in ('seg', 'log', 'machine') and kind not in seen:
                    seen.add(kind)
                    with self.subTest(case):
                        store.check(case)


if __name__ == '__main__':
    unittest.main()
