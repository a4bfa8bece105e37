# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""`tarsnapd check`: what a monitor is told of a server that works, and of one
that is dead, slow, silent, full, read-only, damaged or somebody else's; and
that a check leaves nothing behind.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

from rawclient import (
    PROGRAM, Client, D, Embedded, Host, R, Serve, W, here, server_directory,
    tarsnapd)

OK, WARNING, CRITICAL, UNKNOWN = range(4)
LINE = re.compile(r'\Atarsnapd (OK|WARNING|CRITICAL|UNKNOWN) - [^\n]+\n\Z')


class Case(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.key = os.path.join(self.path, 'canary.key')
        self.serve = None

    def start(self, *options):
        self.serve = Serve(self.path, *options)
        self.addCleanup(self.serve.kill)
        self.address = '127.0.0.1:%d' % self.serve.port

    def check(self, status, *words, says='', address=None):
        """A check at the server's address, and what it must come to."""
        return self.told(here('check', self.path, '--server',
                              address or self.address, *words), status, says)

    def told(self, done, status, says=''):
        self.assertEqual((done[0], done[2]), (status, ''), done)
        self.assertRegex(done[1], LINE)
        self.assertIn(says, done[1])
        return done[1]

    def canary(self):
        """The server's canary, for what a check does not do."""
        return tarsnapd.Canary(tarsnapd.canary_load(self.key), self.address,
                               30)

    def figures(self):
        found = json.loads(here('stats', self.path, '--json')[1])
        return [found[name] for name in ('machines', 'archives', 'blocks',
                                         'bytes')]


class Works(Case):

    def test_one_line_with_figures(self):
        self.start()
        line = self.check(OK, says='wrote, read and deleted a block')
        self.assertRegex(line, r' in \d+\.\d{3} s\|time=\d+\.\d{3}s;10;60;0 '
                         r'connect=\S+s read=\S+s write=\S+s delete=\S+s\n')
        self.assertEqual(stat.S_IMODE(os.stat(self.key).st_mode), 0o600)
        line = self.check(OK, '--read', says=': read a block in ')
        self.assertNotIn('write=', line)

    def test_nothing_is_left_but_one_block(self):
        self.start()
        self.check(OK)
        before = self.figures()
        self.assertEqual(before[:3], [1, 1, 1])
        for _ in range(3):
            self.check(OK)
        self.assertEqual(self.figures(), before)
        spool = os.path.join(self.path, 'spool')
        self.assertEqual([x for _, _, names in os.walk(spool) for x in names],
                         [])
        for _ in range(2):
            here('clean', self.path, '--used', '99')
        found = json.loads(here('stats', self.path, '--json')[1])
        # Lists of what was deleted wait for more of their kind.
        self.assertLess(found['segment_bytes'], 1.2 * found['bytes'])
        self.assertEqual((found['dropped'], found['orphans']), (0, 0))
        self.check(OK, '--read')

    def test_with_read_only_what_is_stored_is_not_changed(self):
        self.start()
        self.check(CRITICAL, '--read', says='nothing is stored to be read')
        self.check(OK)
        number = '%016x' % tarsnapd.canary_load(self.key).machine
        before = here('index-dump', self.path, number)
        self.check(OK, '--read')
        self.assertEqual(here('index-dump', self.path, number), before)

    def test_from_another_host_with_the_program_and_the_key(self):
        self.start('--workers', '2')
        self.check(OK)
        bare = tempfile.mkdtemp(prefix='bare-')
        self.addCleanup(shutil.rmtree, bare)
        for path in (PROGRAM, self.key):
            shutil.copy(path, bare)
        done = subprocess.run(
            [sys.executable, '-I', os.path.join(bare, 'tarsnapd.py'), 'check',
             '--server', self.address, '--key', 'canary.key'], cwd=bare,
            capture_output=True, text=True)
        self.told((done.returncode, done.stdout, done.stderr), OK)
        self.assertEqual(sorted(os.listdir(bare)),
                         ['canary.key', 'tarsnapd.py'])

    def test_many_at_once(self):
        self.start()
        self.check(OK)
        running = [subprocess.Popen(
            [sys.executable, PROGRAM, 'check', self.path, '--server',
             self.address], stdout=subprocess.PIPE, text=True)
            for _ in range(4)]
        for one in running:
            said = one.communicate()[0]
            self.assertEqual(one.returncode, OK, said)
        self.assertEqual(self.figures()[:3], [1, 1, 1])

    def test_what_a_killed_check_left_goes(self):
        self.start()
        self.check(OK)
        killed = self.canary()
        killed.list()
        killed.write(bytes(32))
        killed.begin(tarsnapd.KIND_WRITE)
        killed.close()
        self.check(OK)
        # It may be another one's that is not finished.
        self.assertEqual(self.figures()[1], 2)
        with mock.patch.object(tarsnapd, 'CANARY_OLD', -1):
            tarsnapd.canary_run(tarsnapd.canary_load(self.key), self.address,
                                30)
        self.assertEqual(self.figures()[1], 1)

    def test_the_address_is_that_of_the_configuration(self):
        with contextlib.closing(socket.create_server(
                ('127.0.0.1', 0))) as sock:
            port = sock.getsockname()[1]
        conf = os.path.join(self.path, 'tarsnapd.conf')
        self.start('--listen', '127.0.0.1:%d' % port)
        for listen in ('127.0.0.1:%d', '[::]:%d', '0.0.0.0:%d'):
            with open(conf, 'w') as file:
                file.write('[server]\nlisten = %s\n' % (listen % port))
            self.told(here('check', self.path), OK, ':%d: wrote' % port)


class Fails(Case):

    def setUp(self):
        super().setUp()
        self.start()
        self.check(OK)

    def test_dead(self):
        self.serve.stop()
        self.check(CRITICAL, says=self.address + ': Connection refused')

    def test_read_only(self):
        self.serve.stop()
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('read-only = yes\n')
        self.start()
        self.check(CRITICAL, says='read-only: what is stored can be read')
        self.check(OK, '--read')

    def test_full(self):
        number = '%016x' % tarsnapd.canary_load(self.key).machine
        here('machine', self.path, 'quota', number, '17k')
        self.check(CRITICAL, says='refused: quota of the machine is 17000')
        self.check(OK, '--read')
        here('machine', self.path, 'quota', number, 'none')
        self.check(OK)

    def test_frozen(self):
        number = '%016x' % tarsnapd.canary_load(self.key).machine
        here('machine', self.path, 'freeze', number, 'w')
        self.check(CRITICAL, says='frozen the role w')

    def test_damaged(self):
        segment = [os.path.join(top, name) for top, _, names in os.walk(
            os.path.join(self.path, 'store', 'seg')) for name in names]
        path = max(segment, key=os.path.getsize)
        # The resident is the first block that was stored.
        path = min((x for x in segment if os.path.getsize(x) > 16000),
                   key=os.path.getmtime)
        with open(path, 'rb') as file:
            good = file.read()
        with open(path, 'wb') as file:
            file.write(good[:9000] + bytes([good[9000] ^ 1]) + good[9001:])
        self.check(CRITICAL, says='a block that was stored is damaged')
        os.unlink(path)
        self.check(CRITICAL, '--read',
                   says='a block that was stored cannot be read')
        with open(path, 'wb') as file:
            file.write(good)
        self.check(OK)

    def test_a_log_that_is_damaged(self):
        base = os.path.join(self.path, 'store', 'log')
        paths = sorted(os.path.join(top, name) for top, _, names in
                       os.walk(base) for name in names)
        self.serve.stop()
        shutil.rmtree(os.path.join(self.path, 'index'))
        os.mkdir(os.path.join(self.path, 'index'), 0o700)
        with open(paths[0], 'r+b') as file:
            file.seek(60)
            file.write(b'????')
        self.start()
        # What can be read still is; but nobody can store a backup.
        self.check(CRITICAL, says='read-only: what is stored can be read')

    def test_somebody_else(self):
        other = server_directory(self)
        serve = Serve(other)
        self.addCleanup(serve.kill)
        self.check(CRITICAL, address='127.0.0.1:%d' % serve.port,
                   says='another server than the canary\'s')
        # One with the same identity and another store.
        serve.stop()
        shutil.copy(os.path.join(self.path, 'identity.key'), other)
        serve = Serve(other)
        self.addCleanup(serve.kill)
        self.check(CRITICAL, address='127.0.0.1:%d' % serve.port,
                   says='another store than the canary\'s')

    def talker(self, talk):
        """The address of something that does talk(socket)."""
        listener = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(listener.close)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    sock = listener.accept()[0]
                    threading.Thread(target=talk, args=(sock,),
                                     daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return '127.0.0.1:%d' % listener.getsockname()[1]

    def test_silent_or_no_server_of_ours(self):
        held = []
        self.check(CRITICAL, '--timeout', '1', says='no answer in 1 seconds',
                   address=self.talker(held.append))

        def http(sock):
            with sock:
                sock.recv(1000)
                sock.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')

        self.check(CRITICAL, address=self.talker(http))
        for sock in held:
            sock.close()

    def test_slow(self):
        def relay(sock):
            with sock, socket.create_connection(
                    ('127.0.0.1', self.serve.port)) as peer:
                time.sleep(1.2)
                back = threading.Thread(target=pump, args=(peer, sock))
                back.start()
                pump(sock, peer)
                back.join()

        def pump(source, target):
            with contextlib.suppress(OSError):
                while True:
                    data = source.recv(65536)
                    if not data:
                        break
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        self.check(WARNING, '--warn', '1', address=self.talker(relay))

    def test_unknown(self):
        bad = os.path.join(self.path, 'bad')
        with open(bad, 'w') as file:
            file.write('{"machine": 5}')
        for words, says in (
                ([], 'or --server and --key'),
                (['/nonexistent'], 'not a server directory'),
                ([self.path, '--key', '/nonexistent'], 'No such file'),
                ([self.path, '--key', bad], 'not the key of a canary'),
                ([self.path, '--server', 'host'], 'host is not HOST:PORT'),
                ([self.path, '--server', 'h:99999'], 'is not HOST:PORT'),
                ([self.path, '--warn', '0'], '--warn must be'),
                ([self.path, '--odd'], 'unknown option')):
            with self.subTest(words):
                self.told(here('check', *words), UNKNOWN, says)
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('front-certificate = tls.crt\n')
        self.told(here('check', self.path), UNKNOWN, 'is behind a front')


class Key(Case):

    def test_it_opens_nothing_else(self):
        """Its keys are those of a machine of its own, and cannot nuke."""
        self.start()
        self.check(OK)
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W, D)
        host.backup(client, 'one')
        with open(self.key) as file:
            values = json.load(file)
        values['machine'] = '%016x' % host.machine
        stolen = os.path.join(self.path, 'stolen')
        with open(stolen, 'w') as file:
            json.dump(values, file)
        self.check(CRITICAL, '--key', stolen, says='not the machine\'s key')
        self.assertEqual(set(values), set(tarsnapd.CANARY_FIELDS))


if __name__ == '__main__':
    unittest.main()
