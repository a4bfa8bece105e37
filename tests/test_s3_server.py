# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A server whose store is a bucket, from init to its loss and back."""

import copy
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import unittest
from unittest import mock

import s3peers
from rawclient import (
    COMPLETE, DELETE_KIND, Client, Embedded, Error, Host, N, D, R, W, block,
    get, names_body, put, run, sha, tarsnapd)
from s3peers import Wire
from test_s3_store import environment
from world import World, seed_choose, tree_equal, tree_small

PEERS = {}
NUMBERS = iter(range(10 ** 6))


def setUpModule():
    unittest.addModuleCleanup(lambda: [p.close() for p in PEERS.values()])
    PEERS['moto'] = s3peers.Moto()
    PEERS['swift'] = s3peers.Swift()
    for peer in PEERS.values():
        with environment(peer.environment()):
            tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')


def place():
    """A store nobody uses yet."""
    return 's3://backup/%d' % next(NUMBERS)


class Life(unittest.TestCase):

    def world(self, peer, kind, port=None):
        return World(self, kind, init=('--store', place()),
                     env=PEERS[peer].environment(port))

    def tree(self, w, seed):
        path = w.path('tree')
        tree_small(path, seed)
        return path

    def restored(self, w, archive, tree, **options):
        out = w.extract(archive, **options)
        tree_equal(self, tree, os.path.join(out, 'tree'))

    def test_backup_loss_of_the_server_and_its_return(self):
        w = self.world('moto', 'tls')
        w.keygen()
        tree = self.tree(w, seed_choose('life on moto'))
        w.ok('-c', '-f', 'one', '-C', w.root, 'tree')
        w.ok('-c', '-f', 'two', '-C', w.root, 'tree')
        self.restored(w, 'one', tree)
        w.ok('-d', '-f', 'one')
        figures = w.server.stat()

        # What is in the server directory besides keys is lost.
        w.server.kill()
        for name in ('index', 'spool', 'tmp', 'store'):
            shutil.rmtree(os.path.join(w.server.path, name))
            os.mkdir(os.path.join(w.server.path, name), 0o700)
        w.server.start()
        self.assertEqual(w.names(), ['two'])
        self.assertEqual(w.server.stat(), figures)
        self.restored(w, 'two', tree)

        # Another host of the same identity takes over, then the first again.
        first, second = w.server.path, w.path('second')
        os.mkdir(second)
        for name in ('identity.key', 'tarsnapd.conf'):
            shutil.copy(os.path.join(first, name), second)
        with open(os.path.join(second, 'tarsnapd.conf'), 'a') as file:
            file.write('workers = 2\n')
        self.assertEqual(w.tarsnapd('init', second).out.strip(), w.server.pin)
        for path, name in ((second, 'three'), (first, 'four')):
            w.server.kill(signal.SIGTERM)
            w.server.path = path
            w.server.start()
            w.ok('-c', '-f', name, '-C', w.root, 'tree')
            self.restored(w, 'two', tree)
        self.assertEqual(w.names(), ['four', 'three', 'two'])
        dumps = {w.tarsnapd('index-dump', path, '%016x' % number).out
                 for path in (first, second)
                 for number in tarsnapd_machines(w, first)}
        self.assertEqual(len(dumps), 1)

    def test_two_servers_and_two_hosts_at_once_while_it_is_cleaned(self):
        # Of two puts of an object at the same moment Swift lets both win, so
        # the wire passes them on one by one, as Amazon's S3 does.
        wire = Wire(self, PEERS['swift'])
        wire.putting = threading.Lock()
        w = self.world('swift', 'tls', wire.port)
        w.keygen()
        first, second = w.server, w.path('second')
        os.mkdir(second)
        for name in ('identity.key', 'tarsnapd.conf'):
            shutil.copy(os.path.join(first.path, name), second)
        w.tarsnapd('init', second)
        other = copy.copy(first)
        other.path, other.port = second, 0
        other.start()
        self.addCleanup(other.kill, signal.SIGTERM)
        ports = [first.port, other.port]
        for number in range(2):
            tree_small(w.path('tree%d' % number), number)
        for turn in range(3):
            running = [w.start(
                '-c', '-f', '%d-%d' % (turn, n), '--server',
                '127.0.0.1:%d' % ports[(n + turn) % 2], '-C', w.root,
                'tree%d' % n, cache=w.path('cache%d' % n)) for n in range(2)]
            w.tarsnapd('clean', (first.path, second)[turn % 2])
            for one in running:
                done = one.wait()
                self.assertEqual(done.code, 0, done)
            if turn:
                w.ok('-d', '-f', '%d-0' % (turn - 1), '--server',
                     '127.0.0.1:%d' % ports[0], cache=w.path('cache1'))
        names = ['0-1', '1-1', '2-0', '2-1']
        for port in ports:
            found = w.ok('--list-archives', '--server',
                         '127.0.0.1:%d' % port, cache=None).out.split()
            self.assertEqual(sorted(found), names)
        for name in ('0-1', '2-0'):
            out = w.extract(name, '--server', '127.0.0.1:%d' % ports[1],
                            cache=None)
            tree = 'tree' + name[-1]
            tree_equal(self, w.path(tree), os.path.join(out, tree))
        machine, = tarsnapd_machines(w, first.path)
        self.assertEqual(*[w.tarsnapd('index-dump', path,
                                      '%016x' % machine).out
                           for path in (first.path, second)])

    def test_a_client_that_serves_itself(self):
        w = self.world('swift', 'dir')
        w.keygen()
        tree = self.tree(w, seed_choose('embedded on Swift'))
        w.ok('-c', '-f', 'one', '-C', w.root, 'tree')
        self.assertEqual(os.listdir(os.path.join(w.address, 'store')), [])
        w.ok('-c', '-f', 'two', '-C', w.root, 'tree')
        w.ok('-d', '-f', 'one')
        shutil.rmtree(w.path('cache'))
        w.ok('--fsck')
        w.tarsnapd('rebuild', w.address)
        self.restored(w, 'two', tree)
        self.assertEqual(w.names(), ['two'])

    def test_on_a_wire_that_fails_every_tenth_time(self):
        seed = seed_choose('a bad wire to Swift')
        dice = random.Random(seed)
        faults = ('500', 'slow', 'reset', 'lost', 'torn')
        wire = s3peers.Wire(self, PEERS['swift'], lambda *_: (
            dice.choice(faults) if dice.random() < 0.1 else None))
        w = self.world('swift', 'dir', wire.port)
        w.keygen()
        tree = self.tree(w, seed)
        for name in ('one', 'two'):
            w.ok('-c', '-f', name, '-C', w.root, 'tree')
        w.ok('-d', '-f', 'one')
        self.restored(w, 'two', tree)
        self.assertEqual(w.names(), ['two'])
        self.assertTrue([x for x in wire.seen if x[2]])


def tarsnapd_machines(w, path):
    """Numbers of the machines a server directory knows."""
    return [int(line.split()[0], 16) for line in
            w.tarsnapd('machine', path, 'list').out.splitlines()]


class Commits(unittest.TestCase):
    """Several servers, and answers that are lost, at the commit."""

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.base = base.name
        self.store = place()
        # Requests that commit fail as `fault` says while it says so.
        self.fault = None
        self.wire = s3peers.Wire(self, PEERS['swift'], lambda _, method, path:
                                 self.fault if method == 'PUT'
                                 and '/log/' in path else None)
        for context in (
                environment(PEERS['swift'].environment(self.wire.port)),
                mock.patch.dict(tarsnapd.S3_LIMIT, {
                    'first delay': 0.001, 'first delay if slow': 0.001})):
            context.__enter__()
            self.addCleanup(context.__exit__, None, None, None)

    def server(self, name):
        path = os.path.join(self.base, name)
        tarsnapd.server_create(path, {'store': self.store})
        client = Client(Embedded(path))
        self.addCleanup(client.close)
        return client

    def commit_of(self, host, client, label):
        """(commit object, what it links) of a transaction with one block."""
        tid = os.urandom(16)
        host.begin(client, tid)
        record = put(client, block('a', label))
        linked = [(sha(label.encode()), record, bytes(16), COMPLETE)]
        return host.build(tid, puts=[record], linked=linked), linked

    def test_two_servers_on_one_bucket(self):
        one, two = self.server('one'), self.server('two')
        self.assertEqual(one.store, two.store)
        host = Host(one)
        for client in (one, two):
            client.auth(host.machine, host.keys, R, W, D, N)
        # Both have a transaction on the same base: one of them wins.
        commit, linked = self.commit_of(host, one, 'one')
        other, _ = self.commit_of(host, two, 'two')
        self.assertEqual(one.call('COMMIT', commit)[0], 'COMMITTED')
        with self.assertRaises(Error) as caught:
            two.call('COMMIT', other)
        self.assertEqual(caught.exception.code, 'CONFLICT')
        host.remember(commit, linked)
        two.call('ABORT')
        for i, client in enumerate((two, one, two, one)):
            _, record, names = host.backup(client, 'backup %d' % i)
            for reader in (one, two):
                self.assertNotIn('NOBLOCK', get(reader, names + [record]))

    def test_a_transaction_that_moves_to_another_server(self):
        limit = mock.patch.dict(tarsnapd.LIMIT, {'segment': 10000})
        limit.start()
        self.addCleanup(limit.stop)
        one, two = self.server('one'), self.server('two')
        host, tid = Host(one), os.urandom(16)
        for client in (one, two):
            client.auth(host.machine, host.keys, R, W)
        host.begin(one, tid)
        blocks = [block('c', 'n%d' % i, 6000) for i in range(3)]
        for sent in blocks[:2]:
            put(one, sent)
        one.wait_received(2)    # a segment is full, and in the bucket
        put(one, blocks[2])
        one.wait_received(3)    # this one is in the spool of the first only
        count, _, rows = host.begin(two, tid)
        self.assertEqual([row[0] for row in rows], [x[0] for x in blocks[:2]])
        record = put(two, block('a', 'record'))
        linked = [(sha(b'x'), record, bytes(16), COMPLETE)]
        names = [x[0] for x in blocks[:2]] + [record]
        commit = host.commit(two, tid, puts=names, linked=linked)
        self.assertNotIn('NOBLOCK', get(one, names))
        # The first has the rest still; nothing can come of it.
        host.n, host.head = 1, sha(commit)
        other = host.build(tid, puts=[blocks[2][0]])
        with self.assertRaises(Error):
            one.call('COMMIT', other)
        self.assertEqual(get(two, [blocks[2][0]]), ['NOBLOCK'])

    def test_nothing_is_acknowledged_before_s3_confirmed_it(self):
        client = self.server('one')
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        for n, fault in enumerate(('500', 'reset', 'lost'), 1):
            with self.subTest(fault):
                commit, linked = self.commit_of(host, client, fault)
                self.fault = fault
                with self.assertRaises(Error) as caught:
                    client.call('COMMIT', commit)
                self.assertEqual(caught.exception.code, 'INTERNAL')
                self.assertIn(self.store + '/log/', str(caught.exception))
                self.fault = None
                # The same commit again: as though it were the first time.
                self.assertEqual(client.call('COMMIT', commit)[0],
                                 'COMMITTED')
                host.remember(commit, linked)
                self.assertEqual(host.n, n)


class Words(unittest.TestCase):
    """What is wrong is said in one line; nothing is left half made."""

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.path = os.path.join(base.name, 'srv')
        context = environment(PEERS['moto'].environment())
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def fails(self, *args, says):
        status, out, said = run(*args)
        self.assertEqual((status, out), (1, ''))
        self.assertEqual(said.count('\n'), 1, said)
        self.assertIn(says, said)

    def test_init(self):
        for words, says in (
                (['--store', 's3://'], 's3:// is not s3://BUCKET/PREFIX'),
                (['--store', 'gs://bucket'], 'is not s3://BUCKET/PREFIX'),
                (['--store', 's3://none'], '404 NoSuchBucket'),
                (['--store', place(), '--s3-endpoint', 'ftp://x'], 'ftp://x'),
                (['--store', place(), '--s3-endpoint', 'http://h/x'],
                 's3-endpoint http://h/x'),
                (['--store', place(), '--s3-addressing', 'odd'], 'odd'),
                (['--store', place(), '--s3-profile', 'gone'],
                 'no profile gone'),
                (['--store', place(), '--s3-secret-key', 'x'],
                 'unknown option --s3-secret-key')):
            with self.subTest(words):
                self.fails('init', self.path, *words, says=says)
                shutil.rmtree(self.path, ignore_errors=True)

    def test_options_are_those_of_the_manual(self):
        with open(os.path.join(os.path.dirname(tarsnapd.__file__), 'man',
                               'tarsnapd.conf.5')) as file:
            found = set(re.findall(r'^\.It Ic (\S+) No =', file.read(), re.M))
        self.assertEqual(found, tarsnapd.CONF_OPTIONS)
        self.assertLessEqual(set(tarsnapd.INIT_OPTIONS), found)

    def test_a_server_that_replaces_objects(self):
        with s3peers.OpenMoto() as peer, environment(peer.environment()):
            tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')
            wire = Wire(self, peer, lambda *_: 'unconditional')
            with environment(peer.environment(wire.port)):
                self.fails('init', self.path, '--store', 's3://backup/x',
                           says='this S3 server replaces objects despite '
                           '"If-None-Match: *"; a store there could lose data')
            # A good one that turned bad is refused when it is opened.
            self.assertEqual(run('init', self.path, '--store',
                                 's3://backup/y')[0], 0)
            with environment(peer.environment(wire.port)):
                self.fails('serve', self.path, says='If-None-Match')

    def test_init_again_with_something_else(self):
        first = place()
        self.assertEqual(run('init', self.path, '--store', first)[0], 0)
        self.assertEqual(run('init', self.path, '--store', first)[0], 0)
        self.fails('init', self.path, '--store', place(), says='edit that')

    def test_a_secret_that_others_can_read(self):
        peer = PEERS['moto']
        os.mkdir(self.path)
        conf = os.path.join(self.path, 'tarsnapd.conf')
        with open(conf, 'w') as file:
            file.write('[server]\nstore = %s\ns3-access-key = %s\n'
                       's3-secret-key = %s\n' % (place(), peer.access,
                                                 peer.secret))
        for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
            del os.environ[name]
        os.chmod(conf, 0o644)
        self.fails('init', self.path, says='others can read it')
        os.chmod(conf, 0o600)
        self.assertEqual(run('init', self.path)[0], 0)

    def test_keys_that_may_only_read(self):
        peer = PEERS['moto']
        self.assertEqual(run('init', self.path, '--store', place())[0], 0)
        client = Client(Embedded(self.path))
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        _, record, names = host.backup(client, 'one')
        client.close()
        for name, value in zip(('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'),
                               peer.reader):
            os.environ[name] = value
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        client.auth(host.machine, host.keys, R, W)
        self.assertNotIn('NOBLOCK', get(client, names + [record]))
        with self.assertRaises(Error) as caught:
            host.begin(client, os.urandom(16))
        self.assertEqual(caught.exception.code, 'READONLY')
        status, out, said = run('stats', self.path)
        self.assertEqual((status, out.split()[3]), (0, '1'))
        self.assertRegex(said, r'^tarsnapd: read-only: write s3://\S+/probe: '
                         r'403 AccessDenied.*\n\Z')

    def test_a_store_that_is_not_there(self):
        self.assertEqual(run('init', self.path, '--store', place())[0], 0)
        conf = os.path.join(self.path, 'tarsnapd.conf')
        with open(conf) as file:
            text = file.read()
        with open(conf, 'w') as file:
            file.write(text.replace('s3://backup/', 's3://backup/other'))
        self.fails('stats', self.path, says='no store there')
        os.environ['AWS_SECRET_ACCESS_KEY'] = 'wrong'
        self.fails('serve', self.path, says='403 SignatureDoesNotMatch')

    def test_cleaned_over_a_wire_that_breaks_and_rebuilt(self):
        self.assertEqual(run('init', self.path, '--store', place())[0], 0)
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W, D)
        made = [host.backup(client, 'a%d' % i, 6, 20000) for i in range(6)]
        for archive, record, names in made[:4]:
            tid, gone = os.urandom(16), [record] + names[1:]
            host.begin(client, tid, kind=DELETE_KIND)
            client.send('DELETE', names_body(gone))
            host.commit(client, tid, kind=DELETE_KIND, deletes=gone,
                        unlinked=[(archive, record)])
        rng = random.Random(seed_choose('cleaning on S3'))
        wire = Wire(self, PEERS['moto'], lambda *_: rng.choice(
            [None] * 4 + ['500', 'lost', 'reset', 'torn']))
        policy = tarsnapd.Policy()
        policy.copies = -1
        with environment(PEERS['moto'].environment(wire.port)), \
                mock.patch.dict(tarsnapd.S3_LIMIT, {
                    'first delay': 0.001, 'attempts': 3}):
            for _ in range(6):
                try:
                    self.clean(host, policy)
                except (tarsnapd.StoreError, tarsnapd.ServerError):
                    pass            # it gave up; the next goes on
        self.assertGreater(wire.count, 20)
        for _ in range(3):
            found = self.clean(host, policy)
        self.assertEqual((found['dropped'], found['orphans']), (0, 0))
        self.assertLess(found['segment bytes'], 1.1 * found['bytes'])
        kept = [names[0] for _, _, names in made] + made[5][2] + [made[5][1]]
        self.assertNotIn('NOBLOCK', get(client, kept))
        client.close()
        number = '%016x' % host.machine
        before = run('index-dump', self.path, number)
        shutil.rmtree(os.path.join(self.path, 'index'))
        os.mkdir(os.path.join(self.path, 'index'), 0o700)
        status, said, _ = run('rebuild', self.path)
        self.assertEqual(status, 0)
        print('from S3: ' + said, end='')
        self.assertEqual(run('index-dump', self.path, number), before)

    def clean(self, host, policy):
        """One round; the figures after it."""
        server = tarsnapd.Server(self.path)
        try:
            server.run(tarsnapd.clean(host.machine, policy,
                                      tarsnapd.Cleaned()))
            return server.run(tarsnapd.stats(host.machine))
        finally:
            server.close()


if __name__ == '__main__':
    unittest.main()
