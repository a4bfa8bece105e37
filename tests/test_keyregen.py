# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap-keyregen: a key file for a machine that takes an old one's place."""

import os
import stat
import subprocess

import samples
import tarsnap
import test_keygen
from test_keygen import PASSWORD, USER, drive

R, W, D, N = samples.ROLES
KEYREGEN = test_keygen.KEYGEN[:-1] + ['keyregen']
QUICK = ['--passphrase-time', '0.05', '--passphrase-mem', '1M']


class Online(test_keygen.Online):
    """With a server that knows the machine of old.key."""

    def setUp(self):
        super().setUp()
        self.old = os.path.join(self.temp, 'old.key')
        self.check_passes(self.make(path=self.old), PASSWORD)
        self.old_key = self.load(self.old)

    def regen(self, *more, old=None):
        return KEYREGEN + ['--keyfile', self.path, '--oldkey',
                           old or self.old, '--machine', 'heir', *more]

    def fails(self, argv, words, stdin=b'', **env):
        return super().fails(argv, words, stdin, tool='tarsnap-keyregen',
                             **env)

    def closed(self):
        """old.key with the passphrase `old`."""
        path = os.path.join(self.temp, 'closed.key')
        tarsnap.key_write(tarsnap.key_create(path), self.old_key, b'old',
                          1000000, 0.05)
        return path


class Made(Online):
    def test_a_machine_of_its_own_on_the_old_server(self):
        self.assertEqual(self.check_passes(
            self.regen('--user', USER), PASSWORD), '')
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        old, new = self.old_key, self.load()
        self.assertTrue(any(
            line.split() == ['%016x' % new.machine, USER, 'heir']
            for line in self.machines()))
        self.assertNotEqual(new.machine, old.machine)
        self.assertEqual((new.server, new.store, new.pins),
                         (old.server, old.store, old.pins))
        self.check_secrets(old, new)
        remote = tarsnap.Remote(new, samples.ROLES)
        try:
            remote.connect()
        finally:
            remote.close()

    def check_secrets(self, old, new):
        """Names are made alike; no other secret is shared."""
        self.assertEqual(new.parent, old.public_hash())
        for field in ('k_data', 'k_refs', 'k_cut'):
            self.assertEqual(getattr(new, field), getattr(old, field))
        for field in ('data_priv', 'refs_priv', 'mix_data', 'mix_refs',
                      'data_pub', 'refs_pub'):
            self.assertNotEqual(getattr(new, field), getattr(old, field))
        self.assertFalse(set(new.sign_privs.values())
                         & set(old.sign_privs.values()))
        self.assertTrue(all(new.can(role) for role in samples.ROLES))

    def test_subsets_say_whose_heir_they_are(self):
        self.check_passes(self.regen('--user', USER), PASSWORD)
        cut = os.path.join(self.temp, 'cut.key')
        self.check_passes(test_keygen.KEYMGMT + [
            '--outkeyfile', cut, '-rw', self.path])
        self.assertEqual(self.load(cut).parent, self.old_key.public_hash())

    def test_to_another_server(self):
        server = os.path.join(self.temp, 'store')
        done = self.run_tool(self.regen('--server', server))
        self.assertEqual(done.returncode, 0)
        self.assertIn(b'can destroy', done.stderr)
        self.assertEqual(done.stderr.count(b'\n'), 1)
        self.assertEqual(self.load().server, server)

    def test_from_a_directory_no_password_is_read(self):
        """The first line of standard input is the old key's passphrase."""
        self.old_key.server = os.path.join(self.temp, 'store')
        self.old_key.pins = []
        subprocess.run(test_keygen.SERVER + ['init', self.old_key.server],
                       check=True, stdout=subprocess.DEVNULL)
        done = self.run_tool(self.regen(old=self.closed()), b'old\n')
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.load().server, self.old_key.server)

    def test_a_write_key_is_enough(self):
        cut = os.path.join(self.temp, 'write.key')
        tarsnap.key_write(tarsnap.key_create(cut), self.old_key.subset({W}))
        self.check_passes(self.regen('--user', USER, old=cut), PASSWORD)
        self.check_secrets(self.old_key, self.load())


class Order(Online):
    """CLI 4.2: what is asked for, in which order."""

    def test_on_a_terminal(self):
        old = self.closed()
        enter = 'Please enter passphrase for keyfile %s: '
        status, output = drive(
            self.regen('--user', USER, '--passphrased', *QUICK, old=old),
            [('Enter tarsnap account password: ', PASSWORD + b'\n'),
             (enter % old, b'old\n'), (enter % self.path, b'new\n'),
             ('Please confirm passphrase for keyfile %s: ' % self.path,
              b'other\n'), ('mismatch', b''), (enter % self.path, b'new\n'),
             ('confirm', b'new\n')])
        self.assertEqual(status, 0, output)
        self.assertTrue(self.load(passphrase=b'new').can(R))

    def test_on_a_pipe(self):
        done = self.run_tool(
            self.regen('--user', USER, '--passphrased', *QUICK,
                       old=self.closed()), PASSWORD + b'\nold\nnew\nnew')
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (0, b'', b''))
        self.assertTrue(self.load(passphrase=b'new').can(R))

    def test_methods_of_both(self):
        self.check_passes(
            self.regen('--user', USER, '--passphrase', 'env:OLD',
                       '--new-passphrase', 'env:NEW', *QUICK,
                       old=self.closed()), PASSWORD, OLD='old', NEW='new')
        self.assertTrue(self.load(passphrase=b'new').can(R))


class Refused(Online):
    """Exit 1, one line, no key file, no new machine."""

    def test_failures(self):
        read = os.path.join(self.temp, 'read.key')
        tarsnap.key_write(tarsnap.key_create(read),
                          self.old_key.subset({R, D, N}))
        user = ('--user', USER)
        for name, argv, words, stdin in (
                ('wrong password', self.regen(*user),
                 'No user with that address exists, or the password is '
                 'incorrect', b'wrong'),
                ('no such user', self.regen('--user', 'nobody@example.org'),
                 'No user with that address exists, or the password is '
                 'incorrect', PASSWORD),
                ('wrong passphrase', self.regen(*user, old=self.closed()),
                 'Passphrase is incorrect', PASSWORD + b'\nwrong\n'),
                ('no such key file', self.regen(*user, old='/nowhere'),
                 '/nowhere', PASSWORD),
                ('a key that cannot write', self.regen(*user, old=read),
                 'The write authorization is not in key file ' + read,
                 PASSWORD),
                ('another server than pinned',
                 self.regen(*user, '--fingerprint', '00' * 32), self.pin,
                 PASSWORD),
                ('--user missing', self.regen(), '--user is missing', b''),
                ('network down',
                 self.regen(*user, '--server', '127.0.0.1:1'),
                 'Cannot connect', PASSWORD),
                ('method', self.regen(*user, '--passphrase', 'dev:null'),
                 'Invalid passphrase method', PASSWORD)):
            with self.subTest(name):
                self.check_unregistered(argv, words, stdin)

    def test_file_exists(self):
        self.write('new.key', b'precious')
        before = self.machines()
        done = self.run_tool(self.regen('--user', USER), PASSWORD)
        self.assertEqual(done.returncode, 1)
        with open(self.path, 'rb') as file:
            self.assertEqual(file.read(), b'precious')
        self.assertEqual(self.machines(), before)


if __name__ == '__main__':
    import unittest
    unittest.main()
