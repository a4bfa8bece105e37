# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Rot is named and costs what it hits: a seeded share of tests/rot.py."""

import os
import unittest
from unittest import mock

import lab
import rot
import s3peers
import tarsnapd
import world
from rawclient import here
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


class Lists(unittest.TestCase):

    def test_one_damaged_object_hides_no_other(self):
        store = rot.Store(self, world.seed_choose('rot'))
        number = '%016x' % store.lab.key.machine
        key = [x for x in store.keys if x.startswith('machine/')][0]
        with lab.no_fsync(), mock.patch.object(tarsnapd, 'SCRYPT',
                                               (4, 8, 1)):
            server = tarsnapd.Server(store.lab.store)
            other = server.run(tarsnapd.machine_create('joe', 'other',
                                                       bytes(128)))
            server.run(tarsnapd.account_create('jim', b'pw'))
            joe = server.run(tarsnapd.account_need('joe'))[1]['id']
            server.close()
        store.write(key, store.keys[key][:-5])
        status, out, said = here('machine', store.lab.store, 'list')
        self.assertEqual(status, 0)
        self.assertEqual(sorted(out.splitlines()), sorted([
            '%s - ?' % number, '%016x joe other' % other]))
        self.assertIn(key, said)
        account = [x for x in store.objects() if x.startswith(
            'account/%s/' % joe)][0]
        store.write(account, b'{}')
        status, out, said = here('user', store.lab.store, 'list')
        self.assertEqual((status, out), (0, 'jim\n'))
        self.assertIn(account, said)
        self.assertIn('%016x ? other' % other, here(
            'machine', store.lab.store, 'list')[1])


class Repair(unittest.TestCase):

    def test_what_is_known_elsewhere_comes_back(self):
        """To the byte: log entries, and all of a segment but its data."""
        self.mend(rot.Store(self, world.seed_choose('repair')), 25)

    def mend(self, store, most):
        kinds = {'seg': ('magic', 'header', 'table', 'footer'),
                 'log': ('head', 'commit', 'segments', 'sum', 'cut', 'half',
                         'empty', 'lost', 'doubled'),
                 'list': ('magic', 'count', 'rows', 'sum', 'cut', 'empty')}
        seen, whole = set(), dict(store.keys)
        for case in store.cases():
            kind = case.key.split('/')[0], case.part
            if case.part not in kinds.get(kind[0], ()) or kind in seen or (
                    case.key in store.dropped) or len(seen) == most or (
                    kind[0] == 'list' and case.key.replace(
                        'list/', 'seg/') in store.dropped):
                continue
            seen.add(kind)
            store.harm(case._replace(index=True))
            store.scrub()
            harmed = store.objects()
            with self.subTest(case), lab.no_fsync():
                status, out, said = here('repair', store.lab.store,
                                         '--dry-run')
                self.assertEqual((status, out), (
                    0, 'can be mended %s\n' % case.key), said)
                self.assertEqual(store.objects(), harmed)
                status, out, said = here('repair', store.lab.store)
                self.assertEqual((status, out, said), (
                    0, 'mended %s\n' % case.key, ''))
                self.assertEqual(store.objects(), whole)
                self.assertEqual(store.scrub(), {})
        self.assertGreater(len(seen), min(most, 15) - 1)

    def test_what_is_not_known_stays_as_it_is(self):
        store, done = rot.Store(self, world.seed_choose('repair')), set()
        for case in store.cases():
            kind = case.key.split('/')[0], case.part[:5]
            if kind in done or case.key in store.dropped or kind not in (
                    ('seg', 'entry'), ('seg', 'half'), ('seg', 'lost'),
                    ('machi', 'conte')):
                continue
            done.add(kind)
            store.harm(case._replace(index=True))
            store.scrub()
            harmed = store.objects()
            with self.subTest(case), lab.no_fsync():
                for words in ((), ('--dry-run',)):
                    status, out, said = here('repair', store.lab.store,
                                             *words)
                    self.assertEqual((status, out), (2, ''))
                    self.assertIn(case.key, said)
                    self.assertEqual(store.objects(), harmed)
        self.assertEqual(len(done), 3)

    def test_an_index_gets_what_it_lacked(self):
        """A segment is lost, the index is made without it, and an operator
        puts the segment back.
        """
        store = rot.Store(self, world.seed_choose('repair'))
        key = [x for x in store.keys if x.startswith('seg/')
               and x not in store.dropped][0]
        for name in (key, 'list/' + key[4:]):
            if name in store.keys:
                store.write(name, None)
        where = os.path.join(store.lab.store, 'index')
        for name in os.listdir(where):
            os.unlink(os.path.join(where, name))
        result = store.host.run('-d', '-f', 'one', cache=True)
        self.assertEqual(result.status, 1)
        self.assertIn(key, result.err)
        with lab.no_fsync():
            self.assertEqual(here('repair', store.lab.store)[0], 2)
            for name in (key, 'list/' + key[4:]):
                if name in store.keys:
                    path = os.path.join(store.lab.store, 'store', name)
                    with open(path, 'wb') as file:
                        file.write(store.keys[name])
            self.assertEqual(here('repair', store.lab.store), (0, '', ''))
        store.host.good('-d', '-f', 'one')

    def test_the_end_of_the_log_of_an_older_copy_stays_away(self):
        store = rot.Store(self, world.seed_choose('repair'))
        logs = [key for key in store.keys if key.startswith('log/')]
        store.restore()
        entry = tarsnapd.log_decode(store.lab.key.machine, len(logs),
                                    store.keys[logs[-1]])
        for segment in entry.segments:
            os.unlink(os.path.join(store.lab.store, 'store', segment[0]))
        store.write(logs[-1], None)
        for name in store.keys:
            if name.startswith('list/') and name[5:] in {
                    x[0][4:] for x in entry.segments}:
                store.write(name, None)
        self.assertTrue(entry.segments)
        with lab.no_fsync():
            status, out, said = here('repair', store.lab.store)
        self.assertEqual((status, out), (2, ''))
        self.assertIn(logs[-1], said)


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
