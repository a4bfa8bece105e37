# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The whole job through a real sshd, and what a forced command refuses."""

import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest

import mainjob
import world

SSHD = shutil.which('sshd', path=os.environ.get('PATH', '')
                    + ':/usr/sbin:/sbin')

SSHD_CONFIG = '''\
ListenAddress 127.0.0.1:%(port)d
HostKey %(root)s/hostkey
AuthorizedKeysFile %(root)s/authorized
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
SetEnv PATH=%(root)s/bin:%(path)s HOME=%(root)s/home
'''

SSH_CONFIG = '''\
Host *
    IdentityFile %(root)s/%(identity)s
    IdentitiesOnly yes
    UserKnownHostsFile %(root)s/known
    GlobalKnownHostsFile none
    BatchMode yes
    LogLevel ERROR
'''


class Sshd:
    """An sshd on loopback with a configuration of its own."""

    def __init__(self, w):
        self.world = w
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        for name in ('hostkey', 'identity', 'forced'):
            subprocess.check_call(
                ['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f',
                 w.path(name)])
        os.mkdir(w.path('bin'))
        # Found through PATH, as if it were installed.
        with open(w.path('bin', 'tarsnapd'), 'w') as file:
            file.write('#!/bin/sh\nexec %s %s "$@"\n' % (
                shlex.quote(sys.executable),
                shlex.quote(w.program('tarsnapd'))))
        os.chmod(w.path('bin', 'tarsnapd'), 0o755)
        self.authorize()
        if os.geteuid() == 0:
            os.makedirs('/run/sshd', 0o755, exist_ok=True)
        self.port = self.start()
        self.connect('identity')

    def authorize(self, forced=None):
        """Who may log in: `identity`, and `forced` for one command only."""
        lines = [self.public('identity')]
        if forced:
            lines.append('restrict,command="%s" %s' % (
                forced, self.public('forced')))
        with open(self.world.path('authorized'), 'w') as file:
            file.writelines(lines)

    def public(self, name):
        with open(self.world.path(name + '.pub')) as file:
            return file.read()

    def start(self):
        """The port of a running sshd."""
        for _ in range(5):
            with socket.create_server(('127.0.0.1', 0)) as free:
                port = free.getsockname()[1]
            self.configure('sshd_config', SSHD_CONFIG, port=port,
                           path=os.environ.get('PATH', '/usr/bin:/bin'))
            running = self.world.spawn([SSHD, '-D', '-e', '-f',
                                        self.world.path('sshd_config')])
            end = time.monotonic() + 20
            while running.process.poll() is None and time.monotonic() < end:
                if b'Server listening on' in running.text():
                    return port
                time.sleep(0.02)
        raise AssertionError('no sshd: %r' % running.text())

    def configure(self, name, text, **fields):
        with open(self.world.path(name), 'w') as file:
            file.write(text % dict(fields, root=self.world.root))

    def connect(self, identity):
        """Let clients log in with the key `identity`."""
        self.configure('ssh_config', SSH_CONFIG, identity=identity)
        with open(self.world.path('known'), 'w') as file:
            file.write('[127.0.0.1]:%d %s' % (self.port,
                                              self.public('hostkey')))
        self.world.environment['TARSNAP_SSH'] = 'ssh -F ' + shlex.quote(
            self.world.path('ssh_config'))

    def address(self, path):
        return 'ssh://%s@127.0.0.1:%d%s' % (self.user, self.port, path)


def ssh_needed():
    if not SSHD or not shutil.which('ssh') or not shutil.which('ssh-keygen'):
        raise unittest.SkipTest('openssh-server or openssh-client is missing')
    if pwd.getpwuid(os.geteuid()).pw_shell.endswith(('nologin', 'false')):
        raise unittest.SkipTest('this user has no shell to log in to')


class Ssh(mainjob.MainJob, unittest.TestCase):

    @classmethod
    def world_make(cls):
        ssh_needed()
        w = world.World(cls, 'dir')
        cls.sshd = Sshd(w)
        w.address = cls.sshd.address(w.path('far', 'store'))
        os.mkdir(w.path('far'))
        return w

    @classmethod
    def tree_make(cls, path, seed):
        world.tree_small(path, seed, 400)

    def test_the_store_is_at_the_far_end(self):
        store = self.world.path('far', 'store')
        self.assertTrue(os.path.isfile(os.path.join(store, 'tarsnapd.conf')))
        self.assertFalse(os.path.exists(self.world.path('store')))

    def test_no_session_is_left(self):
        self.world.names()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            found = subprocess.run(
                ['ps', '-eo', 'args'], stdout=subprocess.PIPE).stdout
            left = [line for line in found.splitlines()
                    if b'session --stdio' in line
                    and os.fsencode(self.world.root) in line]
            if not left:
                return
            time.sleep(0.1)
        self.fail('%r' % left)

    def test_a_killed_session_is_made_anew(self):
        # The shell that runs our tarsnapd tells its process id, and the
        # first one dies in mid-backup.
        w = self.world
        world.tree_noise(w.path('more'), self.seed, 12)
        with open(w.path('bin', 'tarsnapd')) as file:
            real = file.read()
        with open(w.path('bin', 'tarsnapd'), 'w') as file:
            file.write(real.replace('exec', 'echo $$ >>%s; exec' % shlex.quote(
                w.path('pids')), 1))
        try:
            running = w.start('-c', '-f', 'cut', '-C', w.root, 'more')
            spool = w.path('far', 'store', 'spool')
            end = time.monotonic() + world.SECONDS
            while spool_bytes(spool) < 2 * world.MIB:
                self.assertLess(time.monotonic(), end, running.text())
                self.assertIsNone(running.process.poll(), running.text())
                time.sleep(0.01)
            with open(w.path('pids')) as file:
                os.kill(int(file.readline()), signal.SIGKILL)
            done = running.wait()
        finally:
            with open(w.path('bin', 'tarsnapd'), 'w') as file:
                file.write(real)
        with open(w.path('pids')) as file:
            self.assertGreaterEqual(len(file.readlines()), 2)
        self.assertEqual((done.code, done.err), (0, ''))
        world.tree_equal(self, w.path('more'), os.path.join(
            w.extract('cut'), 'more'))
        w.ok('-d', '-f', 'cut')


def spool_bytes(path):
    total = 0
    for top, _, files in os.walk(path):
        for name in files:
            try:
                total += os.stat(os.path.join(top, name)).st_size
            except FileNotFoundError:
                pass
    return total


class Command(unittest.TestCase):
    """TARSNAP_SSH: what cannot be run is no failure of the network."""

    def test_what_cannot_be_run_is_named_at_once(self):
        w = world.World(self)
        w.keygen()
        os.mkdir(w.path('bin'))
        os.symlink('/bin/false', w.path('bin', 'ssh'))
        for command, says in (
                ('/none/such -x', 'Cannot run /none/such: No such file or '
                 'directory'),
                ('ssh "', 'TARSNAP_SSH is no command: No closing quotation'),
                ('', 'Too many network failures: Connection closed by '
                 'ssh://host/x')):
            w.environment.update(TARSNAP_SSH=command, PATH=w.path('bin'))
            done = w.tarsnap('--list-archives', '--server', 'ssh://host/x',
                             cache=None)
            self.assertEqual((done.code, done.lines[0]),
                             (1, 'tarsnap: ' + says))


class ForcedCommand(unittest.TestCase):
    """authorized_keys says: session --stdio DIR --machine N --roles w."""

    @classmethod
    def setUpClass(cls):
        ssh_needed()
        cls.world = w = world.World(cls, 'dir')
        cls.sshd = Sshd(w)
        w.address = cls.sshd.address(w.path('store'))
        world.tree_small(w.path('tree'), world.seed_choose('ForcedCommand'))
        w.keygen()
        w.keygen('stranger')
        w.ok('-c', '-f', 'before', '-C', w.root, 'tree')
        w.ok('-c', '-f', 'before', '-C', w.root, 'tree', cache=w.path('s'),
             key=w.path('stranger'))
        cls.write = w.subset('write', '-w')
        cls.number = w.tool('keymgmt', '--print-key-id', w.key).out.strip()
        cls.sshd.authorize('tarsnapd session --stdio %s --machine %s '
                           '--roles w' % (w.path('store'), cls.number))

    def setUp(self):
        self.sshd.connect('forced')

    def tearDown(self):
        # Whatever was tried, with full rights all is as it was.
        self.sshd.connect('identity')
        self.assertIn('before', self.world.names())
        world.tree_equal(self, self.world.path('tree'), os.path.join(
            self.world.extract('before'), 'tree'))

    def refused(self, *args, **options):
        done = self.world.tarsnap(*args, **options)
        self.assertEqual(done.code, 1, done)
        self.assertNotIn('Traceback', done.err)
        self.assertEqual(done.out, '')
        return done

    def test_writing_is_allowed(self):
        w = self.world
        w.ok('-c', '-f', 'new', '-C', w.root, 'tree', key=self.write)
        self.sshd.connect('identity')
        world.tree_equal(self, w.path('tree'), os.path.join(
            w.extract('new'), 'tree'))

    def test_no_other_role(self):
        w = self.world
        for args in (['--list-archives'], ['-t', '-f', 'before'],
                     ['-x', '-f', 'before', '-C', w.path('home')],
                     ['-d', '-f', 'before']):
            with self.subTest(args):
                done = self.refused(*args)
                self.assertEqual(done.lines[0], 'tarsnap: not allowed on '
                                                'this connection')
        self.assertEqual(os.listdir(w.path('home')), [])

    def test_no_nuke(self):
        self.refused('--nuke', give=b'No Tomorrow\n')

    def test_no_other_machine(self):
        w = self.world
        self.refused('-c', '-f', 'other', '-C', w.root, 'tree',
                     cache=w.path('s'), key=w.path('stranger'))

    def test_no_registration(self):
        w = self.world
        done = w.tool('keygen', '--keyfile', w.path('made'), '--machine', 'x',
                      '--server', w.address)
        self.assertEqual(done.code, 1)
        self.assertNotIn('Traceback', done.err)
        self.assertFalse(os.path.exists(w.path('made')))

    def test_no_other_command_or_directory(self):
        w = self.world
        w.ok('--fsck', key=self.write, cache=w.path('f'),
             env=dict(w.environment))
        done = w.tarsnap('-c', '-f', 'elsewhere', '-C', w.root, 'tree',
                         '--server', self.sshd.address(w.path('other')),
                         key=self.write, cache=w.path('f'))
        self.assertFalse(os.path.exists(w.path('other')), done)
        shell = shlex.split(w.environment['TARSNAP_SSH'])
        out = subprocess.run(
            shell + ['-p', str(self.sshd.port), '127.0.0.1', 'echo hello'],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE).stdout
        self.assertNotIn(b'hello', out)


if __name__ == '__main__':
    unittest.main()
