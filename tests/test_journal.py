# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The journal of a server: what is in a line and what never is, where lines
go, and that nothing that happens to them holds the server up.
"""

import base64
import json
import os
import random
import re
import signal
import socket
import tempfile
import time
import unittest
from unittest import mock

import world
from rawclient import (
    Client, Closed, Error, Host, Keys, R, W, Serve, Stdio, Wire, block, put,
    run, server_directory, tarsnapd)

PAIR = re.compile(r'([a-z]+)=("(?:[^"\\]|\\.)*"|[^" ]+)(?: |\Z)')
EVENTS = {'start', 'stop', 'connect', 'close', 'request', 'error', 'refuse',
          'trouble'}


def parse(line):
    """A line as {name: text}; it is nothing but pairs."""
    pairs, at = {}, 0
    while at < len(line):
        found = PAIR.match(line, at)
        assert found, line[at:]
        assert found[1] not in pairs, line
        pairs[found[1]] = (json.loads(found[2]) if found[2][0] == '"'
                           else found[2])
        at = found.end()
    return pairs


def parse_all(text):
    return [parse(line) for line in text.splitlines()]


class Lines(unittest.TestCase):

    EVIL = ['', ' ', '"', '\\', 'a=b', '\n', 'x\r\nevent=stop', '\0', '\x7f',
            '\x1b[2J', '\x85', '\u2028', '\ud800', '\u00fc', '\U0001f600',
            'x' * 300, '\U0001f600' * 300]

    def test_whatever_stands_in_it_it_is_one_line_of_pairs(self):
        dice = random.Random(world.seed_choose('journal lines'))
        values = self.EVIL + [''.join(map(chr, (
            dice.randrange(0x300) for _ in range(dice.randrange(40)))))
            for _ in range(500)]
        for value in values:
            line = tarsnapd.journal_line([('one', 1), ('text', value),
                                          ('seconds', 0.25)])
            self.assertTrue(line.isascii() and line.isprintable(), line)
            self.assertLess(len(line), 4000)
            self.assertEqual(parse(line), {'one': '1', 'text': value,
                                           'seconds': '0.250'})
        self.assertLess(len(tarsnapd.journal_value('\U0001f600' * 10 ** 5)),
                        4000)


class Traffic(unittest.TestCase):
    """Clients of every role; what is said of them."""

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'tls')
        with open(os.path.join(w.server.path, 'tarsnapd.conf'), 'a') as file:
            file.write('journal = journal\njournal-level = requests\n')
        w.server.restart()
        world.tree_small(w.path('Geheimtree'), 1, 10)
        cls.key = w.keygen()
        cls.machine = w.tarsnapd('machine', w.server.path,
                                 'list').out.split()[0]
        cls.subsets = [w.subset('key' + flag, flag) for flag in (
            '-r', '-w', '--prune', '--nuke')]
        cls.errors = []
        cls.traffic(w)
        w.server.kill(signal.SIGTERM)
        with open(os.path.join(w.server.path, 'journal')) as file:
            cls.text = file.read()
        cls.lines = parse_all(cls.text)

    @classmethod
    def traffic(cls, w):
        read, write, prune, nuke = cls.subsets
        w.tool('keygen', '--keyfile', w.path('none'), '--machine', 'x',
               '--server', w.address, '--user', world.PASSWORD,
               '--fingerprint', w.server.pin, give=b'Passwort123\n')
        w.ok('-c', '-f', 'Geheimname', '-C', w.root, 'Geheimtree', key=write)
        w.ok('-c', '-f', 'Geheimzwei', '-C', w.root, 'Geheimtree')
        w.ok('--list-archives', '-v', key=read, cache=None)
        w.extract('Geheimname', key=read, cache=None)
        w.ok('--fsck', key=prune, cache=w.path('pruner'))
        w.ok('-d', '-f', 'Geheimname', key=prune, cache=w.path('pruner'))
        w.ok('--undelete', '-f', 'Geheimname')
        w.tarsnapd('machine', w.server.path, 'quota', cls.machine, '1k')
        world.write(w.path('Geheimtree', 'more'), world.noise(10 ** 6, 2))
        w.tarsnap('-c', '-f', 'Geheimdrei', '-C', w.root, 'Geheimtree')
        w.tarsnap('--nuke', key=nuke, cache=None, give=b'No Tomorrow\n')
        cls.strangers(w)

    @classmethod
    def strangers(cls, w):
        """Without a key, and without manners."""
        client = Client(Wire(w.server.port))
        try:
            client.call('AUTH', client.auth_body(
                int(cls.machine, 16), Keys(), R))
        except Error as e:
            cls.errors.append(e.code)
        for name, body in ((99, b'\nevent=stop'), ('AUTH', b'x\n' * 90)):
            client = Client(Wire(w.server.port))
            client.send(name, body)
            try:
                client.next()
            except (Error, Closed) as e:
                cls.errors.append(getattr(e, 'code', 'closed'))
            client.close()

    def of(self, **wanted):
        return [line for line in self.lines if wanted.items() <= line.items()]

    def test_no_secret_and_no_name(self):
        with open(self.key, 'rb') as file:
            content = base64.b64decode(b''.join(
                line for line in file.read().splitlines()
                if not line.startswith(b'#')))
        self.assertGreater(len(content), 300)
        # 16 bytes of a key in any of these forms would be found.
        said = self.text.encode()
        hidden = [b'Geheim', b'large', world.USER.encode(),
                  world.PASSWORD.encode(), b'Passwort123', b'correct']
        for at in range(len(content) - 16):
            part = content[at:at + 16]
            hidden += [part, part.hex().encode()]
        # The machine's number and the pin are in the file, and no secrets.
        for text in hidden:
            self.assertNotIn(text, said)
        for at in range(3):
            encoded = base64.b64encode(content[at:]).decode()
            for i in range(0, len(encoded) - 20, 4):
                self.assertNotIn(encoded[i:i + 20], self.text)

    def test_each_line_has_its_names(self):
        for line in self.lines:
            self.assertRegex(line['time'],
                             r'\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z')
            self.assertIn(line['event'], EVENTS)
            if line['event'] in ('connect', 'close', 'request', 'error'):
                self.assertRegex(line['connection'], r'\A\d+-\d+\Z')
                self.assertEqual(line['address'], '127.0.0.1')
            if line['event'] == 'request':
                for name in ('request', 'in', 'out'):
                    self.assertTrue(line[name].isdigit(), line)
                self.assertRegex(line['seconds'], r'\A\d+\.\d{3}\Z')
        self.assertEqual([line['event'] for line in (
            self.lines[0], self.lines[-1])], ['start', 'stop'])

    def test_every_role_is_told(self):
        for role in 'rwdn':
            self.assertTrue(self.of(type='auth', role=role, result='ok',
                                    claims=self.machine), role)
        self.assertEqual(len(self.of(type='register', result='ok')), 1)
        for kind in ('begin', 'commit', 'revive', 'nuke', 'get', 'list'):
            for line in self.of(type=kind):
                self.assertEqual(line['machine'], self.machine)
            self.assertTrue(self.of(type=kind, result='ok'), kind)
        numbers = [int(line['commit']) for line in self.lines
                   if 'commit' in line]
        self.assertEqual(numbers, sorted(set(numbers)))

    def test_refusals_are_told_with_their_reasons(self):
        self.assertEqual(self.errors, ['ROLE', 'BAD', 'BAD'])
        self.assertEqual(len(self.of(type='auth', result='role',
                                     claims=self.machine)), 1)
        for result in ('login', 'bad'):
            self.assertTrue(self.of(event='request', result=result), result)
        quota = self.of(result='quota')
        self.assertTrue(1 <= len(quota) <= 2, quota)
        self.assertIn('quota of the machine is 1000 bytes', quota[0]['text'])

    def test_bytes_add_up(self):
        stored = [line for line in self.of(type='commit', result='ok')
                  if int(line['puts'])]
        self.assertGreater(sum(int(line['put']) for line in stored), 10 ** 6)
        for close in self.of(event='close'):
            mine = self.of(event='request', connection=close['connection'])
            self.assertGreaterEqual(int(close['in']), sum(
                int(line['in']) for line in mine))
            self.assertGreaterEqual(int(close['out']), sum(
                int(line['out']) for line in mine
                if line['result'] != 'bad'))


class Places(unittest.TestCase):
    """Where lines go, and what becomes of the server."""

    def setUp(self):
        self.path = server_directory(self)
        self.file = os.path.join(self.path, 'journal')

    def stat(self, serve, host):
        client = serve.client()
        client.auth(host.machine, host.keys, R, W)
        client.close()

    def host(self, serve):
        client = serve.client()
        host = Host(client, user='joe', password=b'pw')
        client.close()
        return host

    def lines(self, path):
        with open(path) as file:
            return parse_all(file.read())

    def until(self, what):
        end = time.monotonic() + 20
        while not what():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)

    def test_a_file_is_begun_anew_at_sighup(self):
        for workers in ('1', '3'):
            with self.subTest(workers):
                serve = Serve(self.path, '--workers', workers, '--journal',
                              'journal', '--journal-level', 'sessions')
                self.addCleanup(serve.kill)
                host = self.host(serve)
                before = self.lines(self.file)
                os.rename(self.file, self.file + '.0')
                serve.child.send_signal(signal.SIGHUP)
                self.until(lambda: os.path.exists(self.file))
                time.sleep(0.2)         # each worker does for itself
                self.stat(serve, host)
                self.until(lambda: any(line.get('role') == 'w'
                                       for line in self.lines(self.file)))
                self.assertEqual(serve.stop(), (0, ''))
                self.assertEqual(self.lines(self.file)[-1]['event'], 'stop')
                self.assertEqual(self.lines(self.file + '.0')[:len(before)],
                                 before)
                self.assertEqual(os.stat(self.file).st_mode & 0o137, 0)
                os.unlink(self.file)

    def test_a_pipe_that_nobody_reads_does_not_stop_it(self):
        serve = Serve(self.path, '--journal-level', 'requests')
        self.addCleanup(serve.kill)
        client = serve.client()
        host = Host(client, user='joe', password=b'pw')
        client.auth(host.machine, host.keys, R, W)
        for _ in range(1500):
            client.call('STAT')
        client.close()
        os.set_blocking(serve.child.stderr.fileno(), False)
        said = serve.child.stderr.read()
        os.set_blocking(serve.child.stderr.fileno(), True)
        self.assertLessEqual(len(said), 65536)
        self.stat(serve, host)
        status, more = serve.stop()
        self.assertEqual(status, 0)
        lost = [int(line['lost']) for line in parse_all(more)
                if 'lost' in line]
        self.assertTrue(lost and lost[0] > 500, more)

    def test_syslog(self):
        with tempfile.TemporaryDirectory() as base:
            path = os.path.join(base, 'log')

            def listen():
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self.addCleanup(sock.close)
                sock.bind(path)
                sock.settimeout(10)
                return sock

            with mock.patch.object(tarsnapd, 'SYSLOG', (path,)):
                journal = tarsnapd.Journal('syslog')
                journal.write('start')          # nobody is there
                first = listen()
                journal.write('one')
                journal.trouble('two\nthree')
                got = [first.recv(4096).decode() for _ in range(2)]
                pid = os.getpid()
                for text, severity, event, lost in (
                        (got[0], 30, 'one', '1'), (got[1], 27, 'trouble',
                                                   None)):
                    head = '<%d>tarsnapd[%d]: ' % (severity, pid)
                    self.assertTrue(text.startswith(head), text)
                    line = parse(text[len(head):])
                    self.assertEqual((line['event'], line.get('lost')),
                                     (event, lost))
                first.close()
                os.unlink(path)
                second = listen()
                journal.write('four')
                self.assertIn(b'event=four', second.recv(4096))
                for _ in range(10000):          # until its queue is full
                    if journal.lost:
                        break
                    journal.write('flood')
                self.assertEqual(journal.lost, 1)
                second.recv(4096)
                journal.write('last')
                self.assertEqual(journal.lost, 0)
                journal.sock.close()

    def test_a_pipe_says_where_it_comes_from_and_nothing_to_its_client(self):
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('journal = journal\n')
        with mock.patch.dict(os.environ, SSH_CLIENT='192.0.2.7 1 2'):
            link = Stdio(self.path)
        client = Client(link)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        host.backup(client, 'one')
        link.close()
        lines = self.lines(self.file)
        self.assertEqual({line['address'] for line in lines}, {'192.0.2.7'})
        commit, = [line for line in lines if line.get('type') == 'commit']
        self.assertEqual((commit['commit'], commit['puts']), ('1', '4'))

    def test_one_line_for_many_refused_puts(self):
        serve = Serve(self.path, '--journal', 'journal', '--journal-level',
                      'sessions')
        self.addCleanup(serve.kill)
        client = serve.client()
        host = Host(client, user='joe', password=b'pw')
        run('machine', self.path, 'quota', '%016x' % host.machine, '1')
        client.auth(host.machine, host.keys, W)
        host.begin(client, os.urandom(16))
        for i in range(20):
            put(client, block('c', str(i)))
        for _ in range(20):
            with self.assertRaises(Error):
                client.next()
        client.close()
        serve.stop()
        errors = [line for line in self.lines(self.file)
                  if line['event'] == 'error']
        self.assertEqual([line['result'] for line in errors], ['quota'])

    def test_what_cannot_be(self):
        for words, says in (
                (('--journal', 'none/there'), 'none/there'),
                (('--journal-level', 'all'), 'trouble or sessions')):
            status, out, err = run('serve', self.path, *words)
            self.assertEqual((status, out, err.count('\n')), (1, '', 1), err)
            self.assertIn(says, err)


if __name__ == '__main__':
    unittest.main()
