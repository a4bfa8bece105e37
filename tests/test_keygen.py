# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap-keygen and tarsnap-keymgmt, with a real server and with false ones.

Each command is run as its users run it: a process with a pipe, or with a
terminal.
"""

import contextlib
import datetime
import hashlib
import hmac
import io
import itertools
import os
import pty
import random
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import keygen
import lab
import samples
import tarsnap
import tarsnapd
import world
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from test_review_regressions import once, wire

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEYGEN = [sys.executable, world.Programs.path('keygen'), 'keygen']
KEYMGMT = [sys.executable, world.Programs.path('keygen'), 'keymgmt']
SERVER = [sys.executable, world.Programs.path('tarsnapd')]
# The same program, but for its patience.
HASTY = [sys.executable, '-c', """import sys
sys.path.insert(0, %r)
import keygen, tarsnap
tarsnap.WAITS = (0,) * len(tarsnap.WAITS)
sys.exit(keygen.main())""" % ROOT, 'keygen']
SECONDS = 30            # after which a command hangs

R, W, D, N = samples.ROLES
USER, PASSWORD = 'paranoid@example.org', b'correct horse battery'


def drive(argv, dialogue, stdin=None, **environment):
    """(exit status, output) of a command on a terminal of its own.

    `dialogue` is (text to wait for, bytes to type) in order; `stdin` (bytes)
    is piped, else standard input is the terminal too.
    """
    read, write = os.pipe()
    pid, terminal = pty.fork()
    if not pid:
        if stdin is not None:
            os.dup2(read, 0)
        os.close(write)
        os.environ.update(environment)
        os.execv(argv[0], argv)
    os.close(read)
    os.write(write, stdin or b'')
    os.close(write)
    output, at, end = b'', 0, time.monotonic() + SECONDS
    dialogue = list(dialogue)
    try:
        while select.select([terminal], [], [], end - time.monotonic())[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:             # EIO: nobody has it open any more
                break
            if not data:
                break
            output += data
            while dialogue and dialogue[0][0].encode() in output[at:]:
                text, typed = dialogue.pop(0)
                at = output.index(text.encode(), at) + len(text)
                os.write(terminal, typed)
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        status = os.waitpid(pid, 0)[1]
        os.close(terminal)
    if dialogue:
        raise AssertionError('never saw %r in %r' % (dialogue[0][0], output))
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1, output


class ToolTest(unittest.TestCase):
    def setUp(self):
        temp = tempfile.TemporaryDirectory()
        self.addCleanup(temp.cleanup)
        self.temp = temp.name
        self.path = os.path.join(self.temp, 'new.key')

    def run_tool(self, argv, stdin=b'', **environment):
        """A finished process that had no terminal."""
        done = subprocess.run(
            argv, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, timeout=SECONDS, cwd=self.temp,
            env=dict(os.environ, **environment))
        self.assertNotIn(b'Traceback', done.stderr)
        self.assertNotIn(b'internal error', done.stderr)
        return done

    def fails(self, argv, words, stdin=b'', tool='tarsnap-keygen', **env):
        """The command exits 1 with one line that has `words`; no key file."""
        done = self.run_tool(argv, stdin, **env)
        text = done.stderr.decode()
        self.assertEqual(done.returncode, 1, text)
        self.assertTrue(text.startswith(tool + ': '), text)
        self.assertIn(words, text)
        if 'usage:' not in text:
            self.assertEqual(text.count('\n'), 1, text)
        self.assertEqual(done.stdout, b'')
        self.assertFalse(os.path.lexists(self.path))
        return text

    def check_passes(self, argv, stdin=b'', **env):
        """The command succeeds; its output."""
        done = self.run_tool(argv, stdin, **env)
        self.assertEqual((done.returncode, done.stderr), (0, b''))
        return done.stdout.decode()

    def check_usage(self, main, words):
        """`main`, called in this process, exits 1 and shows its usage."""
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            self.assertEqual(main(words), 1)
        self.assertIn('\nusage: tarsnap-', stderr.getvalue())
        self.assertFalse(os.path.lexists(self.path))

    def write(self, name, data):
        path = os.path.join(self.temp, name)
        with open(path, 'wb') as file:
            file.write(data)
        return path

    def load(self, path=None, passphrase=None):
        """The Key in a file; `passphrase` is what must be asked for."""
        asked = []
        key = tarsnap.key_load(path or self.path,
                               lambda p: asked.append(p) or passphrase)
        self.assertEqual(len(asked), 0 if passphrase is None else 1)
        return key

    def make(self, server, *more, path=None):
        return KEYGEN + ['--keyfile', path or self.path, '--machine', 'box',
                         '--server', server, *more]


class Online(ToolTest):
    """With a server process that has an account."""

    @classmethod
    def setUpClass(cls):
        cls.store = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.store.cleanup)
        cls.dir = os.path.join(cls.store.name, 'srv')
        cls.pin = subprocess.run(
            SERVER + ['init', cls.dir], check=True,
            stdout=subprocess.PIPE).stdout.decode().strip()
        subprocess.run(SERVER + ['user', cls.dir, 'add', USER],
                       input=PASSWORD, check=True)
        cls.daemon = subprocess.Popen(
            SERVER + ['serve', cls.dir, '--listen', '127.0.0.1:0'],
            stderr=subprocess.PIPE)
        cls.addClassCleanup(cls.stop)
        line = cls.daemon.stderr.readline().decode()
        cls.server = '127.0.0.1:%d' % int(line.rpartition(':')[2])

    @classmethod
    def stop(cls):
        cls.daemon.terminate()
        cls.daemon.communicate()

    def make(self, *more, user=USER, pin=True, path=None):
        pins = ('--fingerprint', self.pin) if pin is True else ()
        return super().make(self.server, '--user', user, *pins, *more,
                            path=path)

    def machines(self):
        """Machines the server knows, as it lists them."""
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            self.assertEqual(tarsnapd.main(['machine', self.dir, 'list']), 0)
        return stdout.getvalue().splitlines()

    def check_unregistered(self, argv, words, stdin=PASSWORD, **env):
        """The command fails, and the server knows no new machine."""
        before = self.machines()
        text = self.fails(argv, words, stdin, **env)
        self.assertEqual(self.machines(), before)
        return text


class Registering(Online):
    def test_right_password(self):
        for number, stdin in enumerate((PASSWORD, PASSWORD + b'\n',
                                        PASSWORD + b'\r\nmore\n')):
            path = '%s%d' % (self.path, number)
            self.assertEqual(
                self.check_passes(self.make(path=path), stdin), '')
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
            key = self.load(path)
            self.assertTrue(all(key.can(role) for role in samples.ROLES))
            self.assertEqual(key.pins, [bytes.fromhex(self.pin)])
            self.assertEqual((key.server, key.name), (self.server, 'box'))
            self.assertTrue(any(
                line.split() == ['%016x' % key.machine, USER, 'box']
                for line in self.machines()))

    def test_every_role_of_the_key_is_let_in(self):
        self.check_passes(self.make(), PASSWORD)
        key = self.load()
        for role in samples.ROLES:
            remote = tarsnap.Remote(key, [role])
            try:
                remote.connect()
                self.assertEqual(remote.head, (0, key.genesis()))
            finally:
                remote.close()

    def test_wrong_password_and_unknown_user_look_alike(self):
        one = self.check_unregistered(self.make(), 'incorrect', b'wrong\n')
        two = self.check_unregistered(self.make(user='nobody@example.org'),
                                      'incorrect')
        self.assertEqual(one, two)
        self.check_unregistered(self.make(), 'incorrect', b'')
        self.check_unregistered(self.make(), 'incorrect', PASSWORD + b' ')

    def test_wrong_fingerprint(self):
        wrong = '00' * 32
        self.check_unregistered(self.make('--fingerprint', wrong, pin=False),
                                self.pin)

    def test_several_fingerprints(self):
        pins = ['%02x' % n * 32 for n in range(7)]
        options = [word for pin in pins for word in ('--fingerprint', pin)]
        self.check_passes(self.make(*options), PASSWORD)
        self.assertEqual([pin.hex() for pin in self.load().pins],
                         [self.pin] + pins)

    def test_no_fingerprint_and_no_terminal(self):
        text = self.check_unregistered(self.make(pin=False),
                                       'nothing was sent')
        self.assertIn('--fingerprint ' + self.pin, text)

    def test_existing_key_file(self):
        path = self.write('old.key', b'precious')
        before = self.machines()
        done = self.run_tool(self.make(path=path), PASSWORD)
        self.assertEqual(done.returncode, 1)
        self.assertIn(path.encode(), done.stderr)
        with open(path, 'rb') as file:
            self.assertEqual(file.read(), b'precious')
        self.assertEqual(self.machines(), before)

    def test_key_file_that_cannot_be(self):
        self.check_unregistered(self.make(path=self.temp + '/no/such/dir'),
                                'No such file')

    def test_key_file_comes_first(self):
        """It is there, empty and private, while the password is typed."""
        process = subprocess.Popen(self.make(), stdin=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        try:
            end = time.monotonic() + SECONDS
            while not os.path.exists(self.path):
                self.assertLess(time.monotonic(), end)
                time.sleep(0.01)
            self.assertEqual(os.stat(self.path).st_size, 0)
        finally:
            process.communicate(PASSWORD)
        self.assertEqual(process.returncode, 0)
        self.assertTrue(self.load().can(W))

    def test_interrupted(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process = subprocess.Popen(self.make(), stdin=subprocess.PIPE,
                                       stderr=subprocess.PIPE)
            while not os.path.exists(self.path):
                self.assertIsNone(process.poll())
                time.sleep(0.01)
            process.send_signal(number)
            self.assertEqual(process.communicate(timeout=SECONDS)[1], b'')
            self.assertEqual(process.returncode, 130)
            self.assertFalse(os.path.exists(self.path))

    def test_interrupted_at_the_first_moment(self):
        real = tarsnap.key_create

        def struck(path):
            fd = real(path)
            os.kill(os.getpid(), signal.SIGINT)
            return fd

        with mock.patch.object(tarsnap, 'key_create', struck), \
                self.assertRaises(KeyboardInterrupt), \
                keygen.NewKeyFile(self.path):
            self.fail('it went on')
        self.assertFalse(os.path.exists(self.path))

    def test_closed_streams(self):
        for closed in ('<&-', '2>&-', '<&- >&- 2>&-'):
            done = self.run_tool(
                ['sh', '-c', 'exec "$@" ' + closed, 'sh']
                + self.make(user='nobody@example.org'), b'')
            self.assertEqual(done.returncode, 1)
            self.assertFalse(os.path.exists(self.path))

    def test_nobody_there(self):
        with socket.create_server(('127.0.0.1', 0)) as sock:
            port = sock.getsockname()[1]
        self.fails(ToolTest.make(self, '127.0.0.1:%d' % port, '--user', USER),
                   'Cannot connect')
        self.fails(ToolTest.make(self, 'host.invalid:1', '--user', USER),
                   'host.invalid')


class AnswerLost(lab.LabTest):

    def test_one_machine_for_one_key(self):
        """The server did it, and what it answered is lost."""
        for number, kind in enumerate((tarsnap.REGISTER1, tarsnap.REGISTER2)):
            hook = once(kind, 'after')
            key = tarsnap.key_make(self.lab.store, 'box%d' % number)
            with wire(hook):
                keygen.machine_make(key, tarsnap.TRANSPORT_DIR, '', b'', [])
            self.assertEqual(len(hook.seen), 2)
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                tarsnapd.main(['machine', self.lab.store, 'list'])
            self.assertEqual(
                [line.split()[0] for line in stdout.getvalue().splitlines()
                 if line.endswith(key.name)], ['%016x' % key.machine])


class OnTerminal(Online):
    QUESTION = 'fingerprint)? '

    def test_yes(self):
        for typed in (b'yes\n', b' YES \n', self.pin.encode() + b'\n',
                      b'perhaps\nyes\n'):
            path = self.path + str(len(typed))
            status, output = drive(self.make(pin=False, path=path),
                                   [(self.QUESTION, typed)], PASSWORD)
            self.assertEqual(status, 0, output)
            self.assertIn(self.pin.encode(), output)
            self.assertEqual(self.load(path).pins, [bytes.fromhex(self.pin)])

    def test_no(self):
        wrong = self.pin.translate(str.maketrans('0123456789', '1234567890'))
        for typed in (b'no\n', b'\n', b'\x04',
                      wrong.encode() + b'\ny\nno\n'):
            before = self.machines()
            status, output = drive(self.make(pin=False),
                                   [(self.QUESTION, typed)], PASSWORD)
            self.assertEqual(status, 1, output)
            self.assertIn(b'nothing was sent', output)
            self.assertFalse(os.path.exists(self.path))
            self.assertEqual(self.machines(), before)

    def test_password_is_asked_for_and_not_shown(self):
        status, output = drive(
            self.make(), [('Enter tarsnap account password: ',
                           PASSWORD + b'\n')])
        self.assertEqual((status, output),
                         (0, b'Enter tarsnap account password: \r\n'))
        self.assertTrue(self.load().can(R))

    def test_password_then_fingerprint(self):
        status, output = drive(
            self.make(pin=False),
            [('account password: ', PASSWORD + b'\n'),
             (self.QUESTION, b'yes\n')])
        self.assertEqual(status, 0, output)
        self.assertNotIn(PASSWORD, output)

    def test_interrupt(self):
        status, output = drive(
            self.make(), [('account password: ', b'\x03')])
        self.assertEqual(status, 130)
        self.assertNotIn(b'Traceback', output)
        self.assertFalse(os.path.exists(self.path))

    def test_passphrase(self):
        enter = 'Please enter passphrase for keyfile %s: ' % self.path
        confirm = 'Please confirm passphrase for keyfile %s: ' % self.path
        status, output = drive(
            self.make('--passphrased', '--passphrase-time', '0.05'),
            [(enter, b'one\n'), (confirm, b'two\n'),
             ('Passphrases mismatch', b''), (enter, b'three\n'),
             (confirm, b'three\n')], PASSWORD)
        self.assertEqual(status, 0, output)
        self.assertNotIn(b'three', output)
        self.assertTrue(self.load(passphrase=b'three').can(W))

    def test_passphrase_asked_by_keymgmt(self):
        self.check_passes(self.make(
            '--passphrase', 'env:WORD', '--passphrase-time', '0.05'),
            PASSWORD, WORD='one')
        status, output = drive(
            KEYMGMT + ['--print-key-permissions', self.path],
            [('Please enter passphrase for keyfile %s: ' % self.path,
              b'one\n')])
        self.assertEqual(status, 0)
        self.assertIn(b'reading, writing, and deleting.', output)


class Passphrases(Online):
    QUICK = ('--passphrase-time', '0.05', '--passphrase-mem', '1MB')

    def test_methods(self):
        word = self.write('word', b'from file\n')
        for number, (options, stdin, passphrase) in enumerate((
                (['--passphrase', 'env:WORD'], b'\n', b'from env'),
                (['--passphrase=file:' + word], b'', b'from file'),
                (['--passphrased', '--passphrase', 'dev:stdin-once'],
                 b'\nonce', b'once'),
                (['--passphrased'], b'\none\none', b'one'),
                (['--passphrased'], b'\none\ntwo\nthree\nthree\n',
                 b'three'))):
            path = '%s%d' % (self.path, number)
            done = self.run_tool(self.make(*options, *self.QUICK, path=path),
                                 PASSWORD + stdin, WORD='from env')
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertTrue(self.load(path, passphrase).can(D))

    def test_memory_is_kept_to(self):
        self.check_passes(self.make(
            '--passphrase', 'env:WORD', '--passphrase-mem', '2 MB',
            '--passphrase-time', '5'), PASSWORD, WORD='w')
        with open(self.path, 'rb') as file:
            content = tarsnap.key_untext(file.read(), '')
        self.assertLessEqual(128 * 8 << content[7], 2000000)
        self.assertTrue(self.load(passphrase=b'w').can(N))

    def test_empty_is_refused(self):
        self.fails(self.make('--passphrased'), 'No passphrase on ', PASSWORD)
        # Not confirmed: asks again, and finds the end of its input.
        done = self.run_tool(self.make('--passphrased'), PASSWORD + b'\none')
        self.assertEqual(done.returncode, 1)
        self.assertFalse(os.path.exists(self.path))

    def test_what_can_fail_early_registers_nothing(self):
        for method, words in (('env:SURELY_NOT_SET', 'SURELY_NOT_SET'),
                              ('file:/nowhere', '/nowhere'),
                              ('what:ever', 'what:ever')):
            self.check_unregistered(self.make('--passphrase', method), words)
        self.check_unregistered(self.make('--passphrase', 'env:WORD'), 'empty',
                                WORD='')


class CommandLines(ToolTest):
    def test_version_and_help(self):
        for tool, name in ((KEYGEN, 'keygen'), (KEYMGMT, 'keymgmt')):
            done = self.run_tool(tool + ['--version'])
            self.assertEqual((done.returncode, done.stdout), (0, b''))
            self.assertEqual(done.stderr.decode(), 'tarsnap-%s %s\n'
                             % (name, tarsnap.VERSION))
            self.assertIn('usage: tarsnap-' + name,
                          self.check_passes(tool + ['--help']))
        done = self.run_tool(KEYGEN[:-1] + ['--version'])
        self.assertTrue(done.stderr.startswith(b'tarsnap-keygen '))

    def test_machine_names(self):
        server = os.path.join(self.temp, 'dir')
        for number, name in enumerate(('a', 'a b', '~' * 255, 'x.y_z-1:/')):
            path = '%s%d' % (self.path, number)
            done = self.run_tool(KEYGEN + [
                '--keyfile', path, '--machine', name, '--server', server])
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(self.load(path).name, name)
        for name in ('', 'a' * 256, 'a\n', 'a\tb', '\x7f', 'caf\xe9',
                     '\udcff', '\x1b[31m'):
            self.check_usage(keygen.keygen_main, [
                '--keyfile', self.path, '--machine', name, '--server', server])

    def test_usage_errors(self):
        base = ['--keyfile', self.path, '--machine', 'm', '--user', USER]
        online = base + ['--server', 'localhost:1']
        self.fails(KEYGEN + base, 'usage: tarsnap-keygen')
        for words in ([], base, online[2:], online[:2] + online[4:],
                      ['--keyfile', self.path, '--machine', 'm', '--server',
                       'localhost:1'],
                      online + ['operand'], online + ['--', '--version'],
                      online + ['--machine', 'n'], online + ['--keyfile=x'],
                      online + ['--mach', 'n'], online + ['-x'],
                      online + ['--passphrased=yes'], online + ['--version='],
                      online + ['--fingerprint'],
                      online + ['--fingerprint', 'ab'],
                      online + ['--fingerprint', 'x' * 64],
                      online + ['--fingerprint', 'aa' * 32] * 9,
                      online + ['--passphrase-mem', '1M'],
                      online + ['--passphrase-time', '1'],
                      online + ['--passphrased', '--passphrase-time', '0.04'],
                      online + ['--passphrased', '--passphrase-time', 'nan'],
                      online + ['--passphrased', '--passphrase-time', '86401'],
                      online + ['--passphrased', '--passphrase-mem', '1K'],
                      online + ['--passphrased', '--passphrase-mem', '1KiB'],
                      online + ['--passphrased', '--passphrase-mem', ''],
                      base[:-1] + ['', '--server', 'localhost:1'],
                      base[:-1] + ['u' * 256, '--server', 'localhost:1']):
            self.check_usage(keygen.keygen_main, words)
        for server in ('localhost', 'localhost:', ':9', 'h:x', 'ssh://',
                       'ssh://host', ''):
            self.fails(KEYGEN + base + ['--server', server], 'server address')

    def test_sizes(self):
        for text, size in (('0', 0), ('12', 12), ('1k', 1000), ('2 MB', 2e6),
                           ('3G', 3e9), ('4 T', 4e12), ('1P', 1e15),
                           ('1EB', 1e18), ('7B', 7)):
            self.assertEqual(keygen.size_parse(text, ''), size)
        for text in ('', 'k', '1K', '1  k', '1kk', '-1', '1.5', '1KiB', ' 1',
                     '\u0661'):
            self.assertRaises(keygen.Usage, keygen.size_parse, text, '')

    def test_options(self):
        table = {'-a': keygen.AGAIN, '-b': keygen.FLAG, '--one': keygen.ONCE,
                 '--many': keygen.MANY}
        for words, expected in (
                (['-ab', 'x', '-a'], ({'-a': True, '-b': True}, ['x', '-a'])),
                (['--one=', '--', '-a'], ({'--one': ''}, ['-a'])),
                (['--one', '--many', '--many=a=b', '--many', '-'],
                 ({'--one': '--many', '--many': ['a=b', '-']}, [])),
                (['-', '-a'], ({}, ['-', '-a'])),
                (['-a', '-a'], ({'-a': True}, []))):
            self.assertEqual(keygen.options_parse(words, table), expected)
        for words in (['-c'], ['-abc'], ['--o', 'x'], ['--one'],
                      ['--one', '1', '--one=2'], ['-a=1'], ['--a'], ['-bb']):
            self.assertRaises(keygen.Usage, keygen.options_parse, words,
                              table)


class Directories(ToolTest):
    def directory(self, server, *more, **env):
        done = self.run_tool(self.make(server, *more), **env)
        self.assertEqual((done.returncode, done.stdout), (0, b''),
                         done.stderr)
        text = done.stderr.decode()
        self.assertEqual(text.count('\n'), 1, text)
        self.assertIn('can destroy', text)
        return self.load()

    def test_missing_and_empty(self):
        os.mkdir(os.path.join(self.temp, 'empty'))
        for name in ('missing', 'empty'):
            key = self.directory('./' + name)
            self.assertEqual(key.server, os.path.realpath(
                os.path.join(self.temp, name)))
            remote = tarsnap.Remote(key, [R, W, D, N])
            try:
                remote.connect()
                self.assertEqual(remote.head, (0, key.genesis()))
            finally:
                remote.close()
            os.unlink(self.path)

    def test_second_machine_in_one_store(self):
        server = os.path.join(self.temp, 'store')
        one = self.directory(server)
        os.unlink(self.path)
        two = self.directory(server, '--user', 'ignored@example.org',
                             '--fingerprint', one.pins[0].hex())
        self.assertEqual((one.store, one.pins), (two.store, two.pins))
        self.assertNotEqual(one.machine, two.machine)

    def test_directory_of_something_else(self):
        self.write('precious', b'data')
        self.fails(self.make(self.temp), self.temp)
        self.assertEqual(os.listdir(self.temp), ['precious'])
        self.fails(self.make(self.temp + '/precious'), 'precious')

    def test_other_store_than_pinned(self):
        server = os.path.join(self.temp, 'store')
        self.fails(self.make(server, '--fingerprint', '00' * 32),
                   'nothing was sent')

    def test_through_ssh(self):
        """The words ssh is given, run by a shell in its place."""
        server = os.path.join(self.temp, 'a store')
        subprocess.run(SERVER + ['init', server], check=True,
                       stdout=subprocess.DEVNULL)
        ssh = self.write('ssh', b'for last; do :; done\nexec sh -c "$last"\n')
        far = self.write('tarsnapd', (
            '#!/bin/sh\nexec "%s" "%s" "$@"\n' % tuple(SERVER)).encode())
        os.chmod(far, 0o755)
        address = 'ssh://backup@host:22' + server
        env = {'TARSNAP_SSH': 'sh ' + ssh,
               'PATH': self.temp + ':' + os.environ['PATH']}
        key = self.directory(address, **env)
        self.assertEqual(key.server, address)
        self.assertTrue(all(key.can(role) for role in samples.ROLES))
        os.unlink(self.path)
        self.fails(self.make(address, '--fingerprint', '00' * 32),
                   'nothing was sent', **env)
        self.fails(self.make(address), 'ssh', TARSNAP_SSH='/nowhere/ssh')
        self.fails(self.make(address), 'ssh', TARSNAP_SSH='false')


def certificate(path):
    """A self-signed certificate with its key in file `path`; its DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.datetime(2026, 1, 1)
    cert = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now,
        now + datetime.timedelta(days=9999)).sign(key, hashes.SHA256())
    with open(path, 'wb') as file:
        file.write(cert.public_bytes(serialization.Encoding.PEM))
        file.write(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()))
    return cert.public_bytes(serialization.Encoding.DER)


class FalseServer:
    """Serves TLS connections as told, and writes down what it is sent.

    A connection ends where the answers do, and at GONE among them.
    """

    GONE = object()

    def __init__(self, temp, statement=None, answers=()):
        path = os.path.join(temp, 'false.pem')
        self.der = certificate(path)
        self.identity = ed25519.Ed25519PrivateKey.generate()
        self.public = self.identity.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.pin = hashlib.sha256(self.public).hexdigest()
        self.statement = self.state() if statement is None else statement
        self.answers = list(answers)    # bytes, or a function of `got`
        self.got = b''                  # all that came
        self.connections = 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(path)
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.address = '127.0.0.1:%d' % self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def state(self, der=None, version=1):
        """The body of a STATEMENT, by default an honest one."""
        store, serial = b's' * 16, struct.pack('>Q', 1)
        signature = self.identity.sign(
            b'tarsnap-server-1\0' + store + serial
            + hashlib.sha256(der or self.der).digest())
        return (struct.pack('>H', version) + self.public + store + serial
                + b'n' * 32 + signature)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *failure):
        self.listener.shutdown(socket.SHUT_RDWR)    # if nobody came
        self.thread.join(SECONDS)
        self.listener.close()

    def serve(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), sock, \
                    self.context.wrap_socket(sock, server_side=True) as conn:
                self.connections += 1
                conn.settimeout(SECONDS)
                conn.sendall(frame(128, 0, self.statement))
                self.answer(conn)

    def answer(self, conn):
        while self.read_frame(conn):
            answer = self.answers.pop(0) if self.answers else self.GONE
            if answer is self.GONE:
                return
            if callable(answer):
                answer = answer(self)
            conn.sendall(answer)

    def read_frame(self, conn):
        """Take one frame; False at the end."""
        start = len(self.got)
        while True:
            got = self.got[start:]
            if len(got) >= 9 and len(got) >= 9 + struct.unpack(
                    '>I', got[:4])[0]:
                return True
            data = conn.recv(65536)
            self.got += data
            if not data:
                return False

    def frames(self):
        """[(type, body)] of what came."""
        out, at = [], 0
        while at < len(self.got):
            length, kind, _ = struct.unpack_from('>IBI', self.got, at)
            out.append((kind, self.got[at + 9:at + 9 + length]))
            at += 9 + length
        return out


def frame(kind, rid, body):
    return struct.pack('>IBI', len(body), kind, rid) + body


def challenge(log_n=14, r=8, p=1):
    return frame(131, 1, b'x' * 32 + struct.pack('>BII', log_n, r, p))


REGISTERED = frame(132, 2, struct.pack('>Q', 77) + b's' * 16)


class FalseServers(ToolTest):
    """What a server that is not the right one, or not honest, learns."""

    def check_meeting(self, words, server, pin=True, status=1,
                      program=KEYGEN):
        pins = ('--fingerprint', server.pin) if pin is True else pin
        with server:
            argv = program + self.make(server.address, '--user', USER,
                                       *pins)[len(KEYGEN):]
            if status:
                self.fails(argv, words, PASSWORD)
            else:
                self.check_passes(argv, PASSWORD)
        self.assertNotIn(PASSWORD, server.got)
        return server

    def test_wrong_fingerprint_sees_not_a_byte(self):
        server = FalseServer(self.temp, answers=[challenge(), REGISTERED])
        self.check_meeting('nothing was sent', server,
                           ('--fingerprint', '00' * 32))
        self.assertEqual(server.got, b'')

    def test_no_fingerprint_sees_not_a_byte(self):
        server = FalseServer(self.temp, answers=[challenge(), REGISTERED])
        self.check_meeting(server.pin, server, ())
        self.assertEqual(server.got, b'')

    def test_no_money(self):
        body = struct.pack('>H', tarsnap.E_FUNDS) + b'0'
        server = FalseServer(self.temp, answers=[
            challenge(), frame(tarsnap.ERROR, 2, body)])
        self.check_meeting('Account balance is not positive', server)

    def test_statement_for_another_certificate_sees_not_a_byte(self):
        """Somebody in between, who passes the true server's words on."""
        server = FalseServer(self.temp)
        server.statement = server.state(b'the true certificate')
        self.check_meeting('in between', server)
        self.assertEqual(server.got, b'')

    def test_other_version(self):
        server = FalseServer(self.temp)
        server.statement = server.state(version=2)
        self.check_meeting('protocol 2', server)
        self.assertEqual(server.got, b'')

    def test_damaged_statements(self):
        with FalseServer(self.temp) as server:
            good = server.statement
            socket.create_connection(server.listener.getsockname()).close()
        for damaged in (b'', good[:-1], good + b'\0', bytes(len(good)),
                        good[:-64] + bytes(64)):
            server = FalseServer(self.temp)
            server.statement = damaged
            self.check_meeting('', server, ())
            self.assertEqual(server.got, b'')

    def test_scrypt_parameters_are_insisted_on(self):
        for numbers in ((13, 8, 1), (19, 8, 1), (14, 7, 1), (14, 9, 1),
                        (14, 8, 2), (14, 8, 0), (0, 0, 0), (255, 8, 1)):
            server = FalseServer(self.temp, answers=[challenge(*numbers)])
            self.check_meeting('not used', server)
            self.assertEqual([kind for kind, _ in server.frames()], [2])

    def test_the_exchange(self):
        """The proof, computed here once more from the protocol page."""
        proofs = set()
        for _ in range(2):
            server = FalseServer(self.temp,
                                 answers=[challenge(), REGISTERED])
            self.check_meeting('', server, status=0)
            key = self.load()
            os.unlink(self.path)
            self.assertEqual((key.machine, key.store), (77, b's' * 16))
            (kind1, first), (kind2, second) = server.frames()
            self.assertEqual((kind1, kind2), (2, 3))
            self.assertEqual(first[32:], bytes([len(USER)]) + USER.encode())
            self.assertEqual(second[:-32], b'\3box' + b''.join(
                key.sign_pubs[role] for role in (1, 2, 3, 4)))
            derived = hashlib.scrypt(PASSWORD, salt=b'x' * 32, n=1 << 14, r=8,
                                     p=1, maxmem=1 << 26, dklen=32)
            client = hmac.digest(derived, b'client', 'sha256')
            mask = hmac.digest(hashlib.sha256(client).digest(),
                               server.statement + first + second[:-32],
                               'sha256')
            self.assertEqual(bytes(a ^ b for a, b in zip(second[-32:], mask)),
                             client)
            proofs.add(second[-32:])
        self.assertEqual(len(proofs), 2)

    def test_no_secret_of_the_key_is_sent(self):
        server = FalseServer(self.temp, answers=[challenge(), REGISTERED])
        self.check_meeting('', server, status=0)
        key = self.load()
        for secret in itertools.chain(
                key.sign_privs.values(),
                (getattr(key, field) for field in tarsnap.SECRETS_ALL)):
            self.assertNotIn(secret, server.got)

    def test_answers_that_are_none(self):
        rng = random.Random(20260101)
        cases = [(words, [frame(130, 1, struct.pack('>H', code)
                                + b'busy\n\x1b[31m')])
                 for code, words in ((6, 'Account balance'), (9, 'busy??[31m'),
                                     (12, 'incorrect'), (999, 'busy'))]
        cases += [
            ('', []), ('', [challenge()]),
            ('', [frame(131, 1, b'short')]),
            ('', [challenge()[:-1] + b'\1\0']),
            ('type 132', [frame(132, 1, bytes(24))]),
            ('', [frame(130, 1, b'')]),
            ('longer', [struct.pack('>IBI', 1 << 31, 131, 1)]
             * len(tarsnap.WAITS)),
            ('another store', [challenge(), frame(
                132, 2, struct.pack('>Q', 77) + b'o' * 16)]),
            ('', [challenge(), frame(132, 2, bytes(8) + b's' * 16)]),
            ('', [challenge(), frame(132, 2, bytes(9))]),
            ('balance', [challenge(), frame(130, 2, b'\0\6no')]),
        ]
        cases += [('', [rng.randbytes(300)]) for _ in range(3)]
        for words, answers in cases:
            with self.subTest(answers=answers):
                self.check_meeting(
                    words, FalseServer(self.temp, answers=answers),
                    program=HASTY)

    def meet(self, server):
        """Register a new key in this process; the waits before each try.

        The Key, and the arguments of each scrypt.
        """
        waits, real, derived = [], tarsnap.scrypt_derive, []

        def derive(*args):
            derived.append(args)
            return real(*args)

        key = tarsnap.key_make(server.address, 'box')
        with server, mock.patch.object(time, 'sleep', waits.append), \
                mock.patch.object(tarsnap, 'scrypt_derive', derive):
            try:
                keygen.machine_make(key, tarsnap.TRANSPORT_TLS, USER,
                                    PASSWORD, [bytes.fromhex(server.pin)])
            finally:
                self.waits, self.derived = waits, derived
        return key

    def test_cut_off_anywhere(self):
        """It is tried again, with the same keys, and scrypt done once."""
        gone = FalseServer.GONE
        for cuts in ([gone], [challenge(), gone],
                     [gone, challenge(), gone, gone, challenge(), gone]):
            server = FalseServer(self.temp, answers=cuts + [
                challenge(), REGISTERED])
            key = self.meet(server)
            self.assertEqual((key.machine, key.store), (77, b's' * 16))
            self.assertEqual(server.connections, cuts.count(gone) + 1)
            self.assertEqual(self.waits, [
                wait for wait in tarsnap.WAITS[:server.connections] if wait])
            self.assertEqual(len(self.derived), 1)
            seconds = [body for kind, body in server.frames() if kind == 3]
            self.assertEqual(len({body[:-32] for body in seconds}), 1)
            self.assertEqual(len(set(seconds)), len(seconds))   # no replay
            self.assertNotIn(PASSWORD, server.got)

    def test_cut_off_for_ever(self):
        """As often as the client tries, and with its waits."""
        server = FalseServer(self.temp)
        said = io.StringIO()
        with self.assertRaisesRegex(
                tarsnap.RemoteError, 'Too many network failures: Connection '
                'closed by ' + server.address), \
                contextlib.redirect_stderr(said):
            self.meet(server)
        self.assertEqual(server.connections, len(tarsnap.WAITS))
        self.assertEqual(self.waits, [wait for wait in tarsnap.WAITS if wait])
        self.assertEqual(said.getvalue().count('trying again'), 1)
        server = FalseServer(self.temp)
        with server:
            self.fails(HASTY + self.make(
                server.address, '--user', USER, '--fingerprint',
                server.pin)[len(KEYGEN):], 'Too many network failures: ',
                PASSWORD)

    def test_another_server_the_second_time(self):
        """Whoever cuts the line cannot put himself into its place."""
        server, other = FalseServer(self.temp), FalseServer(self.temp)
        other.listener.close()

        def answer(conn):
            if server.read_frame(conn):
                server.statement = other.state(server.der)
        server.answer = answer
        with self.assertRaisesRegex(tarsnap.RemoteError, 'nothing was sent'):
            self.meet(server)
        self.assertEqual([kind for kind, _ in server.frames()], [2])

    def test_asked_for_the_fingerprint_once(self):
        """The server does not wait for somebody who compares it."""
        server = FalseServer(self.temp, answers=[challenge(), REGISTERED])
        real, server.answer = server.answer, lambda conn: setattr(
            server, 'answer', real)
        with server:
            status, output = drive(
                self.make(server.address, '--user', USER),
                [(OnTerminal.QUESTION, b'yes\n')], PASSWORD)
        self.assertEqual((status, server.connections), (0, 2), output)
        self.assertEqual(output.count(OnTerminal.QUESTION.encode()), 1)

    def test_busy_is_not_tried_again(self):
        """The server says for how long it is; that is no hitch."""
        body = struct.pack('>H', tarsnap.E_BUSY) + b'try again in 60 seconds'
        server = FalseServer(self.temp, answers=[
            challenge(), frame(tarsnap.ERROR, 2, body)])
        self.check_meeting('try again in 60 seconds', server)
        self.assertEqual(server.connections, 1)


class Keymgmt(ToolTest):
    SENTENCES = {
        (R, W, D, N): 'reading, writing, and deleting.',
        (R, W): 'reading and writing.',
        (R, D, N): 'reading and deleting.',
        (R,): 'reading.',
        (W, N): 'writing and nuking.',
        (W,): 'writing.',
        (N,): 'nuking.',
        (): 'nothing.',
        (D,): 'pruning.',
        (R, D): 'reading and pruning.',
        (W, D): 'writing and pruning.',
        (D, N): 'pruning and nuking.',
        (R, N): 'reading and nuking.',
        (R, W, D): 'reading, writing, and pruning.',
        (R, W, N): 'reading, writing, and nuking.',
        (W, D, N): 'writing, pruning, and nuking.',
    }

    def setUp(self):
        super().setUp()
        self.key = samples.full_key()
        self.full = self.store('full.key', self.key)

    def store(self, name, key):
        path = os.path.join(self.temp, name)
        tarsnap.key_write(tarsnap.key_create(path), key)
        return path

    def cut(self, flags, *inputs, out=None, **env):
        """Run keymgmt and load what it made."""
        out = out or self.path
        text = self.check_passes(KEYMGMT + ['--outkeyfile', out] + flags
                                 + list(inputs or [self.full]), **env)
        self.assertEqual(text, '')
        self.assertEqual(stat.S_IMODE(os.stat(out).st_mode), 0o600)
        return out

    def fails_mgmt(self, words, *argv, **env):
        return self.fails(KEYMGMT + list(argv), words,
                          tool='tarsnap-keymgmt', **env)

    def test_subsets(self):
        for number, (flags, roles) in enumerate((
                (['-r'], {R}), (['-w'], {W}), (['-d'], {R, D, N}),
                (['--prune'], {D}), (['--nuke'], {N}), (['-rw'], {R, W}),
                (['-wrd'], {R, W, D, N}), (['-w', '--nuke'], {W, N}),
                (['-r', '--prune'], {R, D}))):
            path = self.cut(flags, out='%s%d' % (self.path, number))
            self.assertEqual(tarsnap.key_encode(self.load(path)),
                             tarsnap.key_encode(self.key.subset(roles)))
            printed = self.check_passes(
                KEYMGMT + ['--print-key-permissions', path])
            self.assertEqual(printed, 'This key has permissions for: %s\n'
                             % self.SENTENCES[tuple(sorted(roles))])

    def test_every_sentence(self):
        self.assertEqual(len(self.SENTENCES), 16)
        for roles, words in self.SENTENCES.items():
            self.assertEqual(keygen.permissions(self.key.subset(roles)),
                             'This key has permissions for: ' + words)

    def test_no_role(self):
        done = self.run_tool(KEYMGMT + ['--outkeyfile', self.path, self.full])
        self.assertEqual((done.returncode, done.stdout), (0, b''))
        self.assertIn(b'warning', done.stderr)
        self.assertEqual(done.stderr.count(b'\n'), 1)
        self.assertEqual(self.load().sign_privs, {})

    def test_merge(self):
        parts = [self.store(str(role), self.key.subset({role}))
                 for role in samples.ROLES]
        path = self.cut(['-rwd'], *parts)
        self.assertEqual(tarsnap.key_encode(self.load(path)),
                         tarsnap.key_encode(self.key))
        path = self.cut(['-r', '--nuke'], *reversed(parts),
                        out=self.path + '2')
        self.assertEqual(tarsnap.key_encode(self.load(path)),
                         tarsnap.key_encode(self.key.subset({R, N})))

    def test_missing_role_is_named(self):
        for have, flags, words in (
                ({W, D, N}, '-r', 'read'), ({R, D, N}, '-w', 'write'),
                ({R, W, N}, '-d', 'delete'), ({R, W, D}, '-d', 'nuke'),
                ({W, D, N}, '-d', 'read'), ({R, W, N}, '--prune', 'delete'),
                ({R, W, D}, '--nuke', 'nuke'), (set(), '-r', 'read')):
            path = self.store('%s%s' % (sorted(have), flags),
                              self.key.subset(have))
            self.fails_mgmt('The %s authorization' % words, '--outkeyfile',
                            self.path, flags, path)

    def test_different_machines(self):
        same_number = samples.full_key()
        other_number = samples.full_key(5)
        for number, key in enumerate((same_number, other_number)):
            path = self.store('other%d' % number, key)
            self.fails_mgmt('different machines', '--outkeyfile', self.path,
                            '-r', self.full, path)

    def test_never_over_a_file(self):
        before = open(self.full, 'rb')
        with before:
            content = before.read()
        done = self.run_tool(KEYMGMT + ['--outkeyfile', self.full, '-r',
                                        self.full])
        self.assertEqual(done.returncode, 1)
        with open(self.full, 'rb') as file:
            self.assertEqual(file.read(), content)

    def test_bad_inputs(self):
        garbage = self.write('garbage', os.urandom(500))
        for path in (garbage, self.temp, '/nowhere', os.devnull):
            self.fails_mgmt(path, '--outkeyfile', self.path, '-r', path)
            self.fails_mgmt(path, '--print-key-id', path)

    def test_printing(self):
        self.assertEqual(
            self.check_passes(KEYMGMT + ['--print-key-id', self.full]),
            '%d\n' % samples.MACHINE)
        expected = hashlib.sha256(b''.join(
            self.key.sign_pubs[role] for role in (1, 2, 3, 4))
            + self.key.data_pub + self.key.refs_pub).hexdigest() + '\n'
        for path in (self.full, self.cut(['--nuke'])):
            self.assertEqual(
                self.check_passes(KEYMGMT + ['--print-fingerprint', path]),
                expected)

    def test_printing_to_nowhere(self):
        done = self.run_tool(['sh', '-c', 'exec "$@" >/dev/full', 'sh']
                             + KEYMGMT + ['--print-key-id', self.full])
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count(b'\n'), 1)

    def test_usage_errors(self):
        out = ['--outkeyfile', self.path]
        self.fails_mgmt('usage: tarsnap-keymgmt', *out)
        for words in ([], out, ['-r', self.full], out + ['-x', self.full],
                      out + ['-r', '--outkeyfile', 'x', self.full],
                      out + ['--passphrase-mem', '1M', '-r', self.full],
                      out + ['--passphrase-time', '1', '-r', self.full],
                      out + ['--passphrase', 'env:X', '--passphrase-time',
                             '1', '-r', self.full],
                      ['--print-key-id', self.full, self.full],
                      ['--print-key-id'], ['--print-key', self.full],
                      ['--print-key-id', self.full, '-r'],
                      ['--print-key-id', self.full] + out,
                      ['--print-key-id', self.full,
                       '--print-key-permissions', self.full]):
            self.check_usage(keygen.keymgmt_main, words)

    def test_passphrases(self):
        one = self.write('one', b'first word\n')
        two = self.write('two', b'second word\n')
        quick = ['--passphrase-time', '0.05', '--passphrase-mem', '1M']
        closed = self.cut(['--new-passphrase', 'file:' + one, '-rwd'] + quick)
        self.assertTrue(self.load(closed, b'first word').can(W))
        again = self.cut(['--passphrase', 'file:' + one, '--new-passphrase',
                          'file:' + two, '-w'] + quick, closed,
                         out=self.path + '2')
        self.assertTrue(self.load(again, b'second word').can(W))
        opened = self.cut(['--passphrase=file:' + one, '-w'], closed,
                          out=self.path + '3')
        self.assertTrue(self.load(opened).can(W))
        os.unlink(self.path)
        os.rename(again, self.temp + '/again')
        self.fails_mgmt('incorrect', '--passphrase', 'file:' + one,
                        '--outkeyfile', self.path, '-w', self.temp + '/again')

    def test_passphrase_on_standard_input(self):
        closed = self.path + '1'
        done = self.run_tool(
            KEYMGMT + ['--outkeyfile', closed, '--passphrased',
                       '--passphrase-time', '0.05', '-r', self.full],
            b'word\nword\n')
        self.assertEqual(done.returncode, 0)
        self.assertEqual(self.check_passes(
            KEYMGMT + ['--print-key-permissions', closed], b'word'),
            'This key has permissions for: reading.\n')
        out = self.check_passes(
            KEYMGMT + ['--passphrase', 'env:WORD', '--print-key-id', closed],
            WORD='word')
        self.assertEqual(out, '%d\n' % samples.MACHINE)


@unittest.skipUnless(shutil.which('scrypt'), 'no scrypt program')
class RealScrypt(ToolTest):
    def test_the_manual_page_is_right(self):
        """The pipeline of tarsnap-keygen(1)."""
        done = self.run_tool(self.make(
            self.temp + '/dir', '--passphrase', 'env:WORD',
            '--passphrase-time', '0.05'), WORD='a word')
        self.assertEqual(done.returncode, 0)
        out = subprocess.run(
            "grep -v '^#' new.key | base64 -d | "
            'scrypt dec --passphrase env:WORD -', shell=True, check=True,
            cwd=self.temp, env=dict(os.environ, WORD='a word'),
            stdout=subprocess.PIPE).stdout
        self.assertEqual(out, tarsnap.key_encode(
            self.load(passphrase=b'a word')))


if __name__ == '__main__':
    unittest.main()
