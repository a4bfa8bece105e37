# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Every command does what tarsnapd(8) says, and fails in one line."""

import base64
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

from cryptography.hazmat.primitives import serialization

from rawclient import (
    PROGRAM, R, W, ZERO, Client, Embedded, Error, Host, Serve, Stdio, Wire,
    block, get, put, run, server_directory, sha, tarsnapd, u16, u64)

RFC_8410 = b'''-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
'''                          # of its section 10.3


class Commands(unittest.TestCase):

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.base = base.name
        self.path = os.path.join(base.name, 'srv')

    def fails(self, *args, stdin=b'', says=''):
        """Exit 1, nothing on stdout, one line of ours on stderr."""
        status, out, err = run(*args, stdin=stdin)
        self.assertEqual((status, out), (1, ''), err)
        self.assertEqual(err.count('\n'), 1, err)
        self.assertTrue(err.startswith('tarsnapd: '), err)
        self.assertIn(says, err)

    def init(self):
        status, out, err = run('init', self.path)
        self.assertEqual((status, err), (0, ''))
        return out.strip()

    def test_version_and_help(self):
        self.assertEqual(run('--version'), (0, 'tarsnapd 1.1.0\n', ''))
        status, out, err = run('--help')
        self.assertEqual((status, err), (0, ''))
        for command in tarsnapd.COMMANDS:
            self.assertIn(command, out)

    def test_help_of_a_command(self):
        for command in tarsnapd.COMMANDS:
            status, out, err = run(command, '--help')
            self.assertEqual((status, err), (0, ''))
            first, *more = out.splitlines()
            self.assertRegex(first, r'^usage: tarsnapd\.py .*\b%s\b' % command)
            for line in more:
                self.assertRegex(line, r'^ {7}(tarsnapd\.py %s|            )'
                                 % command)
            self.assertNotIn('--version', out)
        # Wherever it stands, and nothing is done.
        for args in (('init', self.path, '--help'), ('init', '-h'),
                     ('user', self.path, 'add', '--help')):
            status, out, err = run(*args)
            self.assertEqual((status, err), (0, ''))
            self.assertIn('tarsnapd.py %s SRV' % args[0], out)
        self.assertFalse(os.path.exists(self.path))

    def test_standard_streams_that_are_full_or_closed(self):
        self.init()
        for args in (('--help',), ('--version',), ('stats', '--help'),
                     ('stats', self.path), ('fingerprint', self.path)):
            for where in ('>/dev/full', '>&-', '>&- 2>&-', '<&- >&-'):
                with self.subTest(args, where=where):
                    done = subprocess.run(
                        ['sh', '-c', '"$@" ' + where, 'sh', sys.executable,
                         PROGRAM, *args], capture_output=True, text=True)
                    self.assertEqual((done.returncode, done.stdout), (1, ''))
                    if '2>' not in where:
                        self.assertRegex(done.stderr,
                                         r'^tarsnapd: [^\n]*\n$')
        done = subprocess.run(
            ['sh', '-c', '"$@" >/dev/full', 'sh', sys.executable, PROGRAM,
             'check', self.path, '--timeout', '1'], capture_output=True,
            text=True)
        self.assertEqual(done.returncode, 3, done)      # 1 is a warning
        done = subprocess.run(
            ['sh', '-c', '"$@" 2>/dev/full', 'sh', sys.executable, PROGRAM,
             'nothing'])
        self.assertEqual(done.returncode, 1)
        with open('/dev/full', 'w') as full, \
                mock.patch.object(sys, 'stderr', full):
            tarsnapd.say('that it listens')
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
        done = subprocess.run(
            ['sh', '-c', '"$@" <&-', 'sh', sys.executable, PROGRAM, 'user',
             self.path, 'add', 'x'], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (
            1, 'tarsnapd: user: Bad file descriptor\n'))

    def test_heavy_modules_are_not_loaded_for_nothing(self):
        done = subprocess.run(
            [sys.executable, '-I', '-S', '-c',
             'import sys; sys.path.insert(0, %r); '
             'import tarsnapd; tarsnapd.main(["--version"]); '
             'print(sorted({"ssl", "sqlite3", "cryptography", "socket", '
             '"tempfile"} & set(sys.modules)))' % os.path.dirname(PROGRAM)],
            capture_output=True, text=True)
        self.assertEqual(done.stdout, 'tarsnapd 1.1.0\n[]\n')

    def test_init_prints_the_fingerprint_and_nothing_else(self):
        fingerprint = self.init()
        self.assertRegex(fingerprint, '^[0-9a-f]{64}$')
        self.assertEqual(run('fingerprint', self.path),
                         (0, fingerprint + '\n', ''))
        client = Client(Embedded(self.path))
        self.assertEqual(sha(client.identity).hex(), fingerprint)
        client.close()

    def test_init_makes_private_files(self):
        os.umask(os.umask(0))
        self.init()
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o700)
        for name in ('identity.key', 'tls.key', 'tls.crt', 'secret'):
            mode = os.stat(os.path.join(self.path, name)).st_mode
            self.assertEqual(stat.S_IMODE(mode), 0o600, name)

    def test_init_refuses_what_is_not_its_own(self):
        os.mkdir(self.path)
        with open(os.path.join(self.path, 'precious'), 'w') as file:
            file.write('data')
        self.fails('init', self.path, says='precious')
        self.assertEqual(os.listdir(self.path), ['precious'])
        self.fails('init', os.path.join(self.path, 'precious'))

    def test_init_again_changes_nothing(self):
        first = self.init()
        with open(os.path.join(self.path, 'tarsnapd.conf')) as file:
            before = file.read()
        self.assertEqual(self.init(), first)
        with open(os.path.join(self.path, 'tarsnapd.conf')) as file:
            self.assertEqual(file.read(), before)

    def test_init_that_failed_binds_to_nothing(self):
        self.fails('init', self.path, '--store', 's3://', says='s3://')
        self.init()
        with open(os.path.join(self.path, 'tarsnapd.conf')) as file:
            self.assertNotIn('s3://', file.read())

    def test_a_new_certificate_keeps_the_fingerprint(self):
        first = self.init()
        serve = Serve(self.path)
        before = serve.client()
        self.assertEqual(serve.stop(), (0, ''))
        self.assertEqual(run('cert', self.path), (0, '', ''))
        serve = Serve(self.path)
        self.addCleanup(serve.kill)
        after = serve.client()
        self.assertEqual(sha(after.identity).hex(), first)
        self.assertEqual(after.serial, before.serial + 1)
        self.assertNotEqual(after.link.cert_hash, before.link.cert_hash)
        before.close()
        after.close()

    def test_users(self):
        self.init()
        self.assertEqual(run('user', self.path, 'add', 'zoe', stdin=b'a\n'),
                         (0, '', ''))
        self.assertEqual(run('user', self.path, 'add', 'ann', stdin=b'b'),
                         (0, '', ''))
        self.assertEqual(run('user', self.path, 'list'),
                         (0, 'ann\nzoe\n', ''))
        self.fails('user', self.path, 'add', 'zoe', stdin=b'x\n',
                   says='exists')
        self.fails('user', self.path, 'passwd', 'eve', stdin=b'x\n',
                   says='eve')
        self.fails('user', self.path, 'add', 'eve', says='empty password')
        self.fails('user', self.path, 'close', 'eve', says='eve')
        self.fails('user', self.path, 'rename', 'eve')
        self.assertEqual(run('user', self.path, 'close', 'ann'),
                         (0, '', ''))
        self.assertEqual(run('user', self.path, 'list'), (0, 'zoe\n', ''))
        self.assertEqual(run('user', self.path, 'add', 'ann', stdin=b'c'),
                         (0, '', ''))

    def register(self, serve, password):
        client = serve.client()
        try:
            return Host(client, user='zoe', password=password)
        finally:
            client.close()

    def test_passwords_and_registration(self):
        self.init()
        run('user', self.path, 'add', 'zoe', stdin=b'old\n')
        serve = Serve(self.path)
        self.addCleanup(serve.kill)
        host = self.register(serve, b'old')
        run('user', self.path, 'passwd', 'zoe', stdin=b'new\n')
        with self.assertRaises(Error):
            self.register(serve, b'old')
        self.assertNotEqual(self.register(serve, b'new').machine,
                            host.machine)
        client = serve.client()
        self.assertEqual(client.register(host.keys, 'zoe', b'new'),
                         host.machine)      # the same keys, the same machine
        client.close()
        status, out, err = run('machine', self.path, 'list')
        self.assertEqual((status, err), (0, ''))
        self.assertIn('%016x zoe host\n' % host.machine, out)
        self.assertEqual(out.count('\n'), 2)
        run('user', self.path, 'close', 'zoe')
        with self.assertRaises(Error):
            self.register(serve, b'new')

    def test_stat(self):
        client = Client(Embedded(self.path, create=True))
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        host.backup(client, 'one')
        size = sum(len(x[2]) for x in (
            [block('c', 'one-%d' % i, 1000) for i in range(3)]
            + [block('a', 'one')]))
        client.close()
        status, out, said = run('stats', self.path)
        self.assertEqual((status, said), (0, ''))
        self.assertTrue(out.startswith(
            'machines 1\narchives 1\nblocks 4\nbytes %d\nsegments 1\n'
            % size), out)

    def test_no_server_directory(self):
        for command in ('fingerprint', 'cert', 'stats', 'rebuild',
                        'clean', 'serve'):
            self.fails(command, self.path, says='no such directory')
        os.mkdir(self.path)
        for command in ('fingerprint', 'cert', 'stats', 'rebuild',
                        'clean', 'serve'):
            self.fails(command, self.path, says='not a server directory')

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which('setpriv'),
                         'only root with setpriv can drop its rights')
    def test_a_directory_of_somebody_else(self):
        self.init()
        os.chmod(self.path, 0)
        for command in ('stats', 'init', 'serve'):
            done = subprocess.run(
                ['setpriv', '--bounding-set',
                 '-dac_override,-dac_read_search', sys.executable, PROGRAM,
                 command, self.path], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (
                1, 'tarsnapd: %s: Permission denied\n' % self.path))

    def test_names_in_any_locale_and_on_one_line(self):
        self.init()
        run('user', self.path, 'add', '\xfc \u20ac', stdin=b'secret')
        for env in ({'PYTHONIOENCODING': 'ascii'},
                    {'LC_ALL': 'C', 'PYTHONUTF8': '0',
                     'PYTHONCOERCECLOCALE': '0'}):
            done = subprocess.run(
                [sys.executable, PROGRAM, 'user', self.path, 'list'],
                capture_output=True, env=dict(os.environ, **env))
            self.assertEqual((done.stdout, done.stderr), (
                '\xfc \u20ac\n'.encode(), b''))
            done = subprocess.run(
                [sys.executable, PROGRAM, 'stats', b'none\xff\n\x1b'],
                capture_output=True, env=dict(os.environ, **env))
            self.assertEqual((done.returncode, done.stderr), (
                1, b'tarsnapd: none\xff\\012\\033: no such directory\n'))

    def test_words_that_lack_are_told_of_the_command_meant(self):
        self.init()
        for words, says in (
                (['user', 'add'], 'user SRV add takes 1 more, not 0; see '
                                  'tarsnapd user --help'),
                (['user', 'quota', 'joe'], 'quota takes 2 more, not 1'),
                (['user', 'ad', 'joe'], 'user SRV add|passwd'),
                (['machine', 'show', 'web1'], 'web1 is not a machine number; '
                                              'machine SRV list prints them')):
            self.fails(words[0], self.path, *words[1:], says=says)
        for text in '5.001', '-5', '5,0':
            self.fails('pay', self.path, 'add', 'joe', text, '--by', 'bank',
                       '--reference', 'R1', says='%s is not an amount: digits,'
                       ' and up to 2 behind a point' % text)

    def test_words_are_utf8_in_any_locale(self):
        """Or refused: they go into ledgers, mails and JSON."""
        self.init()
        run('user', self.path, 'add', '\xfc', stdin=b'secret')
        name, path = '\xfc'.encode(), self.path
        good = ('user', path, 'show', name), (
            'user', path, 'credit', name, '5', '--reason', name), (
            'pay', path, 'add', name, '5', '--by', 'bank', '--reference',
            'R1', '--text=' + '\xfc'), (
            'pay', path, 'list', name), ('report', path, '--account', name)
        bad = ('user', path, 'show', b'a\xff'), (
            'user', path, 'add', b'a\xff'), (
            'user', path, 'credit', name, '5', '--reason', b'a\xff'), (
            'user', path, 'debit', name, '5', b'--reason=a\xff'), (
            'user', path, 'erase', name, '--reason', b'a\xff'), (
            'pay', path, 'add', name, '5', '--by', 'bank', '--reference',
            'R2', '--text', b'a\xff'), (
            'pay', path, 'refund', name, 'bank-R1', '--text', b'a\xff'), (
            'machine', path, 'erase', '1', '--reason', b'a\xff'), (
            'report', path, '--account', b'a\xff')
        for env in ({}, {'LC_ALL': 'C', 'PYTHONUTF8': '0',
                         'PYTHONCOERCECLOCALE': '0'}):
            for words in good + bad:
                with self.subTest(words, env=env):
                    done = subprocess.run(
                        [sys.executable, PROGRAM, *words], input=b'secret\n',
                        capture_output=True, env=dict(os.environ, **env))
                    if words in bad:
                        self.assertEqual(
                            (done.returncode, done.stdout, done.stderr),
                            (1, b'', b'tarsnapd: a\\xff is not UTF-8\n'))
                    else:
                        self.assertEqual(done.returncode, 0, done)
        self.assertIn('payment bank-R1 5.000000000000000000 \xfc\n',
                      run('pay', path, 'list')[1])
        self.fails('user', path, 'credit', '\xfc', '5', '--reason', 'a\nb',
                   says='printable')

    def test_usage_errors(self):
        self.init()
        for args in ((), ('nothing',), ('init',), ('init', 'a', 'b'),
                     ('serve', self.path, '--lisen', 'x'),
                     ('serve', self.path, '--listen'),
                     ('serve', self.path, '--listen', 'nowhere'),
                     ('serve', self.path, '--listen', '127.0.0.1:99999'),
                     ('serve', self.path, '--workers', '0'),
                     ('session', self.path),
                     ('session', '--stdio', self.path, '--roles', 'rx'),
                     ('session', '--stdio', self.path, '--machine', 'x'),
                     ('index-dump', self.path, '12'),
                     ('machine', self.path, 'delete')):
            self.fails(*args)

    def test_damaged_configuration(self):
        self.init()
        conf = os.path.join(self.path, 'tarsnapd.conf')
        for text in ('', 'listen = x', '[server]\nlisten\n',
                     '[server]\nworkres = 3\n'):
            with open(conf, 'w') as file:
                file.write(text)
            self.fails('stats', self.path, says='tarsnapd.conf')

    def test_keys_that_others_can_write(self):
        self.init()
        os.chmod(os.path.join(self.path, 'identity.key'), 0o666)
        self.fails('stats', self.path, says='identity.key')

    def test_identity_key(self):
        """As cryptography and the RFC have it, and nothing else."""
        self.init()
        path = os.path.join(self.path, 'identity.key')
        with open(path, 'rb') as file:
            ours = file.read()
        self.assertEqual(
            serialization.load_pem_private_key(ours, None).sign(b'x'),
            tarsnapd.identity_load(ours).sign(b'x'))
        for pem in RFC_8410, RFC_8410.replace(b'\n', b'\r\n'):
            self.assertEqual(base64.b64encode(tarsnapd.raw_public(
                tarsnapd.identity_load(pem))),
                b'Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=')
        for bad in (b'', b'x', ours[:-30], ours[:40],
                    ours.replace(b'PRIVATE', b'PUBLIC'),
                    ours.replace(b'MC4C', b'!!!!'),
                    ours.replace(b'MC4C', b'MC4D'),
                    ours.replace(b'MC4C', b''),
                    tarsnapd.certificate_make(1)[0]):
            with open(path, 'wb') as file:
                file.write(bad)
            self.fails('stats', self.path, says='identity.key: not a key')

    def test_a_store_elsewhere(self):
        store = os.path.join(self.base, 'disk')
        self.init()
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'w') as file:
            file.write('[server]\nstore = %s\n' % store)
        self.fails('stats', self.path, says='no store there')
        self.init()
        client = Client(Embedded(self.path))
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        _, _, names = host.backup(client, 'one')
        self.assertNotIn('NOBLOCK', get(client, names))
        client.close()
        self.assertTrue(os.path.isdir(os.path.join(store, 'seg')))

    def test_port_in_use(self):
        self.init()
        with socket.socket() as sock:
            sock.bind(('127.0.0.1', 0))
            sock.listen()
            self.fails('serve', self.path, '--listen',
                       '127.0.0.1:%d' % sock.getsockname()[1],
                       says='in use')

    def test_serve_without_a_certificate(self):
        tarsnapd.server_create(self.path)
        self.fails('serve', self.path, says='tarsnapd.py cert')

    def test_behind_a_front(self):
        self.init()
        _, pem = tarsnapd.certificate_make(77)
        front = os.path.join(self.base, 'front.pem')
        with open(front, 'wb') as file:
            file.write(pem)
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'w') as file:
            file.write('[server]\nfront-certificate = %s\n' % front)
        serve = Serve(self.path)
        self.addCleanup(serve.kill)
        wire = Wire.__new__(Wire)
        wire.buf = b''
        wire.cert_hash = sha(tarsnapd.certificate_der(front))
        wire.sock = socket.create_connection(('127.0.0.1', serve.port), 10)
        client = Client(wire)       # checks the signature over that hash
        self.assertEqual(client.call('HELLO', u16(1)), ('OK', u16(1)))
        client.close()

    def test_term_finishes_and_exits_0(self):
        self.init()
        run('user', self.path, 'add', 'zoe', stdin=b'pw\n')
        for workers in ('1', '3'):
            serve = Serve(self.path, '--workers', workers)
            client = serve.client()
            host = Host(client, user='zoe', password=b'pw')
            client.auth(host.machine, host.keys, R, W)
            tid = os.urandom(16)
            host.begin(client, tid)
            for i in range(30):
                put(client, block('c', 't%d' % i, 5000))
            client.wait_received(30)
            start = time.time()
            self.assertEqual(serve.stop(), (0, ''))
            self.assertLess(time.time() - start, 10)
            client.close()
            again = Client(Embedded(self.path))
            again.auth(host.machine, host.keys, W)
            self.assertEqual(host.begin(again, tid)[0], 30)
            again.close()

    def test_interrupt_exits_0(self):
        self.init()
        serve = Serve(self.path)
        serve.child.send_signal(signal.SIGINT)
        self.assertEqual(serve.child.wait(10), 0)
        serve.child.stderr.close()

    def test_a_dead_worker_is_replaced(self):
        self.init()
        serve = Serve(self.path, '--workers', '2')
        time.sleep(0.5)
        children = self.children(serve.child.pid)
        self.assertEqual(len(children), 2)
        os.kill(children[0], signal.SIGKILL)
        deadline = time.time() + 10
        while time.time() < deadline:
            now = self.children(serve.child.pid)
            if len(now) == 2 and children[0] not in now:
                break
            time.sleep(0.1)
        self.assertEqual(len(set(now) - {children[0]}), 2)
        serve.client().close()
        self.assertEqual(serve.stop()[0], 0)

    def test_workers_end_with_their_parent(self):
        self.init()
        serve = Serve(self.path, '--workers', '2')
        children = []
        while len(children) < 2:
            children = self.children(serve.child.pid)
        serve.child.kill()
        serve.child.wait()
        serve.child.stderr.close()
        deadline = time.time() + 30
        while time.time() < deadline and any(
                os.path.exists('/proc/%d' % child) for child in children):
            time.sleep(0.1)
        for child in children:
            self.assertFalse(os.path.exists('/proc/%d' % child))

    @staticmethod
    def children(pid):
        with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
            return [int(x) for x in file.read().split()]

    def test_session_on_a_pipe(self):
        link = Stdio(self.path)             # makes the directory
        client = Client(link)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        _, _, names = host.backup(client, 'one')
        self.assertEqual(get(client, names[:1]),
                         [block('c', 'one-0', 1000)[2]])
        client.send(99)
        with self.assertRaises(Error) as caught:
            client.next()
        self.assertEqual(caught.exception.code, 'BAD')
        self.assertEqual(link.close(), 0)

    def test_session_refuses_a_directory_of_others(self):
        os.mkdir(self.path)
        with open(os.path.join(self.path, 'x'), 'w'):
            pass
        self.fails('session', '--stdio', self.path, says='not empty')

    def test_a_pipe_says_received_when_the_client_waits(self):
        link = Stdio(self.path)
        self.addCleanup(link.close)
        client = Client(link)
        host = Host(client)
        client.auth(host.machine, host.keys, W)
        host.begin(client, os.urandom(16))
        put(client, block('c', 'x'))
        client.wait_received(1)
        self.assertEqual(client.received, 1)

    def test_open_local(self):
        with self.assertRaises(tarsnapd.ServerError):
            tarsnapd.open_local(self.path)
        with self.assertRaises(tarsnapd.ServerError):
            tarsnapd.open_local(self.base + '/a\0b', create=True)
        tarsnapd.open_local(self.path, create=True).close()
        tarsnapd.open_local(self.path).close()


class ReadOnly(unittest.TestCase):

    def test_a_read_only_directory_serves_reading(self):
        path = server_directory(self)
        client = Client(Embedded(path))
        host = Host(client)
        client.auth(host.machine, host.keys, R, W)
        archive, record, names = host.backup(client, 'one')
        client.close()
        before = self.tree(path)
        access = os.access
        # root may write anywhere, so what access(2) says is faked
        os.access = lambda where, mode: (
            mode != os.W_OK and access(where, mode))
        self.addCleanup(setattr, os, 'access', access)
        client = Client(Embedded(path))
        self.assertEqual(client.auth(host.machine, host.keys, R, W)[3], 1)
        self.assertEqual(client.call('STAT')[1][:8], u64(1))
        self.assertEqual(len(client.stream('LIST', u16(0))), 2)
        self.assertEqual(len(get(client, names)[0]), len(
            block('c', 'one-0', 1000)[2]))
        self.assertEqual(len(client.stream(
            'CHANGES', u64(0) + ZERO + b'\1')), 2)
        for name in ('BEGIN', 'COMMIT', 'ABORT', 'CHECKPOINT'):
            with self.assertRaises(Error) as caught:
                client.call(name, bytes(106))
            self.assertEqual(caught.exception.code, 'READONLY')
        temporary = client.link.local.server.temporary
        self.assertTrue(os.path.isdir(temporary))
        client.close()
        self.assertFalse(os.path.exists(temporary))
        self.assertEqual(self.tree(path), before)

    @staticmethod
    def tree(path):
        return {(where, name): os.stat(os.path.join(where, name)).st_mtime_ns
                for where, _, names in os.walk(path) for name in names}


if __name__ == '__main__':
    unittest.main()
