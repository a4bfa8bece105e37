# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Scrub finds every kind of rot in every stored object, and goes on."""

import json
import os
import random
import shutil
import tempfile
import unittest
from unittest import mock

import s3peers
from rawclient import (
    COMPLETE, DELETE_KIND, D, R, W, Client, Embedded, Host, Serve,
    block, names_body, put, run, server_directory, sha, tarsnapd)
from test_s3_store import environment

SEED = int(os.environ.get('TEST_SEED', '20261124'))


def filled(path):
    """A machine with archives of all classes, and a delete; its Host."""
    client = Client(Embedded(path))
    host = Host(client)
    client.auth(host.machine, host.keys, R, W, D)
    archive, record, names = host.backup(client, 'first')
    tid = os.urandom(16)
    host.begin(client, tid)
    puts = [put(client, block('i', 'page', 500))]
    puts.append(put(client, block('a', 'second', 200)))
    host.commit(client, tid, puts=puts,
                linked=[(sha(b'two'), puts[1], bytes(16), COMPLETE)])
    tid = os.urandom(16)
    host.begin(client, tid, DELETE_KIND)
    gone = sorted(names + [record])
    client.send('DELETE', names_body(gone))
    host.commit(client, tid, kind=DELETE_KIND, deletes=gone,
                unlinked=[(archive, record)])
    client.close()
    return host


class Files(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        patch = mock.patch.object(tarsnapd.os, 'fsync', lambda fd: None)
        patch.start()
        cls.addClassCleanup(patch.stop)
        cls.whole = server_directory(cls)
        cls.host = filled(cls.whole)

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.path = os.path.join(base.name, 'srv')
        shutil.copytree(self.whole, self.path)
        self.random = random.Random(SEED)

    def place(self, key):
        return os.path.join(self.path, 'store', key)

    def keys(self):
        return sorted(
            os.path.relpath(os.path.join(where, name), self.place(''))
            for where, _, names in os.walk(self.place(''))
            for name in names if name != '.lock')

    def scrub(self, forget=True):
        """The damage a whole new round finds: {key: Damage}."""
        if forget:
            self.forget()
        server = tarsnapd.Server(self.path)
        one = tarsnapd.ScrubRun(server)
        try:
            self.assertTrue(one.run())
        finally:
            one.close()
            server.close()
        return one.scrub.damage

    def forget(self):
        if os.path.exists(os.path.join(self.path, 'scrub')):
            os.unlink(os.path.join(self.path, 'scrub'))

    def write(self, key, data):
        # Written in place it would go to the hard link in a spool, too.
        os.unlink(self.place(key))
        with open(self.place(key), 'wb') as file:
            file.write(data)

    def read(self, key):
        with open(self.place(key), 'rb') as file:
            return file.read()

    def test_nothing_wrong(self):
        self.assertEqual(self.scrub(), {})

    def test_any_byte_of_any_object(self):
        flipped = 0
        self.scrub()                # makes the extracts
        for key in self.keys():
            data = self.read(key)
            places = set(self.random.sample(range(len(data)),
                                            min(len(data), 8)))
            places |= {0, len(data) - 1}
            for place in sorted(places):
                bad = bytearray(data)
                bad[place] ^= 1 << self.random.randrange(8)
                self.write(key, bytes(bad))
                if key == 'store-id' and chr(bad[place]) not in (
                        '0123456789abcdef'):
                    # Nothing opens such a store; that says the same.
                    with self.assertRaisesRegex(tarsnapd.ServerError,
                                                'store-id'):
                        tarsnapd.Server(self.path)
                else:
                    self.assertIn(key, self.scrub(), 'byte %d, seed %d' % (
                        place, SEED))
                flipped += 1
            self.write(key, data)
        self.assertEqual(self.scrub(), {})
        self.assertGreater(flipped, 80)

    def test_cut_empty_missing_exchanged(self):
        self.scrub()
        keys = [x for x in self.keys() if x != 'store-id']
        self.assertEqual(len([x for x in keys if x.startswith('list/')]), 3)
        for key in keys:
            data = self.read(key)
            for bad in (data[:-1], data[:len(data) // 2], b'', data + b'\0'):
                self.write(key, bad)
                self.assertIn(key, self.scrub(), (key, len(bad)))
            self.write(key, data)
        for prefix in ('log/', 'seg/'):
            one, two = [x for x in keys if x.startswith(prefix)][:2]
            a, b = self.read(one), self.read(two)
            self.write(one, b)
            self.write(two, a)
            self.assertLessEqual({one, two}, set(self.scrub()))
            self.write(one, a)
            self.write(two, b)
        for prefix in ('log/', 'seg/', 'machine/'):
            key = [x for x in keys if x.startswith(prefix)][0]
            data = self.read(key)
            os.unlink(self.place(key))
            found = self.scrub()
            self.assertTrue([x for x in found.values() if key in x.key
                             or key.split('/')[1] in x.what], (key, found))
            with open(self.place(key), 'wb') as file:
                file.write(data)

    def test_the_end_of_the_log_is_remembered(self):
        self.scrub()
        key = [x for x in self.keys() if x.startswith('log/')][-1]
        os.unlink(self.place(key))
        found = self.scrub(forget=False)
        self.assertIn('it had 3', found[key].what)

    def test_names_blocks_lost(self):
        key = [x for x in self.keys() if x.startswith('seg/')]
        segments = {}
        for one in key:
            server = tarsnapd.Server(self.path)
            segments[one] = list(tarsnapd.ROW.iter_unpack(
                server.run(tarsnapd.segment_load(one)).table))
            server.close()
        one = max(segments, key=lambda x: len(segments[x]))
        name, _, offset, _, _ = segments[one][1]
        data = bytearray(self.read(one))
        data[offset + 40] ^= 1
        self.write(one, bytes(data))
        found = self.scrub()[one]
        self.assertEqual((found.machine, found.blocks),
                         ('%016x' % self.host.machine, [name.hex()]))
        self.assertIn('entry 1 is damaged', found.what)

    def test_damage_is_looked_at_again_by_every_run(self):
        key = [x for x in self.keys() if x.startswith('seg/')][-1]
        data = self.read(key)
        self.write(key, data[:-1])
        self.assertEqual(set(self.scrub()), {key})
        one = run('scrub', self.path, '--part', '9')
        self.assertEqual(one[0], 2, one)
        self.assertIn(key, one[2])
        self.write(key, data)
        self.assertEqual(run('scrub', self.path, '--part', '9')[0::2],
                         (0, ''))

    def test_parts_make_a_round(self):
        status, out, err = run('scrub', self.path, '--json')
        whole = json.loads(out)
        self.assertEqual((status, err, whole['damaged']), (0, '', []))
        seen = []
        for _ in range(3):
            status, out, _ = run('scrub', self.path, '--part', '3',
                                 '--json')
            seen.append(json.loads(out))
        self.assertEqual([x['segments'] for x in seen], [1, 1, 1])
        self.assertEqual([x['round']['over'] for x in seen],
                         [False, False, True])

    def test_killed_it_goes_on(self):
        with open(os.path.join(self.path, 'scrub'), 'w') as file:
            file.write('{"place": [')               # torn, for all we know
        server = tarsnapd.Server(self.path)
        one = tarsnapd.ScrubRun(server)
        server.run(one.scrub.begin())
        while one.scrub.segments < 2:
            server.run(one.scrub.step())
        one.save()
        os.close(one.lock)                          # and no close()
        server.close()
        status, out, _ = run('scrub', self.path, '--json')
        self.assertEqual(json.loads(out)['segments'], 1)

    def test_rate(self):
        waits = []
        server = tarsnapd.Server(self.path)
        with mock.patch.object(tarsnapd.time, 'sleep', waits.append):
            one = tarsnapd.ScrubRun(server, 1000)
            one.run()
        one.close()
        server.close()
        self.assertAlmostEqual(sum(waits), one.scrub.bytes / 1000)

    def test_one_at_a_time_and_wrong_words(self):
        server = tarsnapd.Server(self.path)
        one = tarsnapd.ScrubRun(server)
        status, _, err = run('scrub', self.path)
        self.assertEqual(status, 1)
        self.assertIn('another process scrubs it', err)
        one.close()
        server.close()
        for wrong in (('--part', '0'), ('--rate', '0'), ('--rate', 'fast')):
            self.assertEqual(run('scrub', self.path, *wrong)[:2], (1, ''))

    def test_a_disk_that_cannot_be_read_is_damage_a_store_away_is_not(self):
        real = tarsnapd.FileStore.get
        bad = [x for x in self.keys() if x.startswith('seg/')][0]

        def one(store, key, offset=0, length=None):
            if key == bad:
                raise tarsnapd.StoreError('read', key, 'Input/output error')
            return real(store, key, offset, length)

        def many(store, key, offset=0, length=None):
            if key.startswith(('log/', 'keys/')):
                raise tarsnapd.StoreError('read', key, 'Input/output error')
            return real(store, key, offset, length)

        with mock.patch.object(tarsnapd.FileStore, 'get', one):
            found = self.scrub()
        self.assertEqual([(x.key, x.what) for x in found.values()],
                         [(bad, 'Input/output error')])
        with mock.patch.object(tarsnapd.FileStore, 'get', many), \
                self.assertRaises(tarsnapd.StoreError):
            self.scrub()

    def test_stats_tell(self):
        self.scrub()
        status, out, said = run('stats', self.path)
        self.assertEqual((status, said), (0, ''))
        self.assertRegex(out, r'(?m)^scrubbed \d{4}-')
        segment, log = [[x for x in self.keys() if x.startswith(kind)][-1]
                        for kind in ('seg/', 'log/')]
        self.write(segment, self.read(segment)[:-1])
        self.scrub(forget=False)
        os.unlink(self.place(log))
        status, out, said = run('stats', self.path, '--json')
        found = json.loads(out)
        self.assertEqual((status, found['damaged'], found['lost']), (2, 1, 1))
        self.assertIn(log, found['machine'][0]['lost'])
        self.assertIn('machine %016x is read-only: %s: is missing'
                      % (self.host.machine, log), said)
        self.assertIn('1 objects are damaged', said)

    def test_a_machine_that_has_stored_nothing(self):
        client = Client(Embedded(self.path))
        Host(client)
        client.close()
        for forget in (True, False):
            self.assertEqual(self.scrub(forget), {})

    def test_while_serving(self):
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('scrub-rate = 10M\nscrub-days = 7\n')
        key = [x for x in self.keys() if x.startswith('seg/')][0]
        self.write(key, self.read(key)[:-1])
        serve = Serve(self.path)
        try:
            line = serve.child.stderr.readline().decode()
            self.assertIn('damaged: %s' % key, line)
        finally:
            serve.stop()
        self.assertEqual(tarsnapd.scrub_conf(tarsnapd.conf_read(self.path)),
                         (10 ** 7, 7 * 86400))
        for wrong in ('0', 'x', '4000'):
            with self.assertRaisesRegex(tarsnapd.ServerError, 'scrub-days'):
                tarsnapd.scrub_conf({'scrub-days': wrong})
        self.forget()

    def test_objects_from_before_there_were_sums(self):
        key = [x for x in self.keys() if x.startswith('machine/')][0]
        value = json.loads(self.read(key))
        del value['sum']
        self.write(key, json.dumps(value).encode())
        self.assertEqual(self.scrub(), {})
        value['usr'] = value.pop('user')
        self.write(key, json.dumps(value).encode())
        self.assertIn(key, self.scrub())


class Bucket(unittest.TestCase):

    def test_round(self):
        peer = s3peers.Moto()
        self.addCleanup(peer.close)
        base = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, base)
        path = os.path.join(base, 'srv')
        with environment(peer.environment()):
            tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')
            tarsnapd.server_create(path, {'store': 's3://backup/x'})
            filled(path)
            server = tarsnapd.Server(path)
            self.addCleanup(server.close)
            one = tarsnapd.ScrubRun(server)
            one.run()
            self.assertEqual(one.scrub.damage, {})
            self.assertEqual(one.scrub.segments, 3)
            for prefix in ('seg/', 'log/', 'machine/'):
                key = server.store.list(prefix)[0]
                data = server.store.get(key)
                server.store.delete(key)
                server.store.put(key, data[:50] + b'?' + data[51:])
                one.run()
                self.assertIn(key, one.scrub.damage)
                server.store.delete(key)
                server.store.put(key, data)
                one.run()
                self.assertEqual(one.scrub.damage, {})
            one.close()


if __name__ == '__main__':
    unittest.main()
