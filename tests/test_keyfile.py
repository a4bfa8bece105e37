# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Key files: what each role's holds, damage, passphrases, scrypt(1)."""

import base64
import itertools
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import unittest
from unittest import mock

import samples
import tarsnap
from tarsnap import UserError

R, W, D, N = samples.ROLES

# The secrets of each role, written down a second time.
HOLDS = {
    R: {'data_priv', 'refs_priv', 'mix_data', 'mix_refs', 'k_data', 'k_refs'},
    W: {'mix_data', 'mix_refs', 'k_data', 'k_refs', 'k_cut'},
    D: {'refs_priv', 'mix_refs', 'k_refs'},
    N: set(),
}
ALL = set().union(*HOLDS.values())
PUBLIC = ('machine', 'store', 'server', 'pins', 'name', 'sign_pubs',
          'data_pub', 'refs_pub')

SALT = bytes(range(32))


def subsets():
    for count in range(5):
        yield from itertools.combinations((R, W, D, N), count)


def no_passphrase(path):
    raise AssertionError('asked for a passphrase')


class KeyFileTest(unittest.TestCase):
    def setUp(self):
        temp = tempfile.TemporaryDirectory()
        self.addCleanup(temp.cleanup)
        self.path = os.path.join(temp.name, 'key')
        self.count = 0

    def new(self):
        self.count += 1
        return '%s%d' % (self.path, self.count)

    def write(self, key, *args):
        path = self.new()
        tarsnap.key_write(tarsnap.key_create(path), key, *args)
        return path

    def put(self, data):
        path = self.new()
        with open(path, 'wb') as file:
            file.write(data)
        return path

    def read(self, path):
        with open(path, 'rb') as file:
            return file.read()

    def check_refused(self, words, call, *args, **kwargs):
        """The call fails in one line that has `words` in it."""
        with self.assertRaises(UserError) as caught:
            call(*args, **kwargs)
        self.assertNotIn('\n', str(caught.exception))
        self.assertIn(words, str(caught.exception))


class Contents(KeyFileTest):
    def test_round_trip(self):
        key = samples.full_key()
        key.pins += [bytes([n]) * 32 for n in range(7)]
        key.parent = b'p' * 32
        key.server = 'ssh://host/d\udcff\xe4'
        loaded = tarsnap.key_load(self.write(key), no_passphrase)
        for field in PUBLIC + ('parent', 'sign_privs') + tuple(ALL):
            self.assertEqual(getattr(loaded, field), getattr(key, field),
                             field)
        self.assertEqual(loaded.public_hash(), key.public_hash())
        self.assertEqual(loaded.genesis(), key.genesis())

    def test_every_secret_is_independent(self):
        keys = [samples.full_key(), samples.full_key()]
        secrets = [secret for key in keys for secret in itertools.chain(
            key.sign_privs.values(), (getattr(key, f) for f in ALL))]
        self.assertEqual(len(secrets), 2 * (4 + 7))
        self.assertEqual(len(set(secrets)), len(secrets))
        self.assertEqual({len(secret) for secret in secrets}, {32})

    def test_each_subset_holds_its_secrets_and_no_other(self):
        full = samples.full_key()
        for roles in subsets():
            with self.subTest(roles=roles):
                path = self.write(full.subset(roles))
                key = tarsnap.key_load(path, no_passphrase)
                holds = set().union(*(HOLDS[role] for role in roles))
                content = tarsnap.key_untext(self.read(path), path)
                for field in ALL:
                    secret = getattr(full, field)
                    self.assertEqual(getattr(key, field),
                                     secret if field in holds else b'', field)
                    self.assertEqual(secret in content, field in holds, field)
                for role in samples.ROLES:
                    self.assertEqual(key.sign_privs.get(role),
                                     full.sign_privs[role] if role in roles
                                     else None)
                    self.assertEqual(full.sign_privs[role] in content,
                                     role in roles)
                for field in PUBLIC:
                    self.assertEqual(getattr(key, field),
                                     getattr(full, field))
                self.assertEqual(key.public_hash(), full.public_hash())

    def test_roles(self):
        full = samples.full_key()
        for roles in subsets():
            key = full.subset(roles)
            for role in samples.ROLES:
                self.assertEqual(key.can(role), role in roles)
        key.need(D, '-d')
        self.check_refused('delete authorization', full.subset({R}).need, D,
                           '-d')

    def test_signing_key_alone_is_no_role(self):
        key = samples.full_key()
        key.refs_priv = b''
        self.assertEqual([key.can(role) for role in samples.ROLES],
                         [False, True, False, True])


class Files(KeyFileTest):
    def test_mode_under_any_umask(self):
        for mask in (0, 0o22, 0o77, 0o777):
            old = os.umask(mask)
            try:
                path = self.write(samples.full_key())
            finally:
                os.umask(old)
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)

    def test_never_over_a_file(self):
        path = self.put(b'precious')
        self.check_refused(path, tarsnap.key_create, path)
        self.assertEqual(self.read(path), b'precious')
        target = self.new()
        os.symlink(target, self.path)
        self.check_refused(self.path, tarsnap.key_create, self.path)
        self.assertFalse(os.path.exists(target))
        self.check_refused('/nowhere', tarsnap.key_create, '/nowhere/key')

    def test_text(self):
        lines = self.read(self.write(samples.full_key())).split(b'\n')
        self.assertEqual(lines[0], b'# START OF TARSNAP KEY FILE')
        self.assertEqual(lines[-2:], [b'# END OF TARSNAP KEY FILE', b''])
        self.assertLessEqual(max(map(len, lines)), 64)
        content = base64.b64decode(b''.join(lines[1:-2]))
        self.assertTrue(content.startswith(b'tarsnap-key\0\1'))

    def test_line_ends_and_surroundings_do_not_matter(self):
        text = self.read(self.write(samples.full_key()))
        text = b'From: me\n' + text + b'-- \nme\n'
        path = self.put(text.replace(b'\n', b'\r\n'))
        self.assertTrue(tarsnap.key_load(path, no_passphrase).can(W))

    def test_unreadable(self):
        self.check_refused('No such file', tarsnap.key_load, self.path,
                           no_passphrase)
        path = self.put(bytes(tarsnap.MIB + 1))
        self.check_refused('too long', tarsnap.key_load, path, no_passphrase)
        self.check_refused('not a key file', tarsnap.key_load, self.put(b''),
                           no_passphrase)

    def test_damaged_anywhere(self):
        """Each byte changed or lost: refused, or the same content."""
        text = self.read(self.write(samples.full_key()))
        content = tarsnap.key_untext(text, '')
        tolerated = 0
        for at in range(len(text)):
            for new in (bytes([text[at] ^ 1]), bytes([text[at] ^ 0x80]), b''):
                damaged = text[:at] + new + text[at + 1:]
                try:
                    key = tarsnap.key_decode(
                        tarsnap.key_untext(damaged, 'F'), 'F')
                except UserError as e:
                    self.assertNotIn('\n', str(e))
                    self.assertIn('F', str(e))
                else:
                    self.assertEqual(tarsnap.key_encode(key), content)
                    tolerated += 1
        # A lost line end, and bits of the last base64 digit nobody reads.
        self.assertLess(tolerated, text.count(b'\n') + 5)

    def test_cut_short_anywhere(self):
        text = self.read(self.write(samples.full_key()))
        for end in range(len(text) - 1):
            self.check_refused('F', tarsnap.key_untext, text[:end], 'F')
        content = tarsnap.key_untext(text, '')
        for end in range(len(content)):
            self.check_refused('F', tarsnap.key_decode, content[:end], 'F')

    def test_checksum_is_not_what_keeps_the_parser_safe(self):
        """Fields damaged below a right checksum: UserError, if anything."""
        content = tarsnap.key_encode(samples.full_key())
        head = len(tarsnap.KEY_MAGIC) + 1
        refused = 0
        for body in samples.mutations(content[head + 32:], 2000, 'fields'):
            try:
                key = tarsnap.key_decode(
                    content[:head] + tarsnap.sha256(body) + body, 'F')
            except UserError as e:
                self.assertNotIn('\n', str(e))
                refused += 1
                continue
            tarsnap.sign(next(iter(key.sign_privs.values()), bytes(32)), b'')
            key.genesis()
            key.public_hash()
            for field in ALL:
                self.assertIn(len(getattr(key, field)), (0, 32))
        self.assertGreater(refused, 500)

    def test_unknown_fields_are_for_newer_versions(self):
        content = tarsnap.key_encode(samples.full_key())
        head = len(tarsnap.KEY_MAGIC) + 1
        body = content[head + 32:] + tarsnap.FIELD_HEAD.pack(99, 3) + b'new'
        key = tarsnap.key_decode(
            content[:head] + tarsnap.sha256(body) + body, 'F')
        self.assertTrue(key.can(R))

    def test_newer_version(self):
        content = tarsnap.key_encode(samples.full_key())
        at = len(tarsnap.KEY_MAGIC)
        self.check_refused('newer', tarsnap.key_decode,
                           content[:at] + b'\2' + content[at + 1:], 'F')

    def test_key_of_the_original_is_refused_in_words(self):
        """Same lines, same base64; machine number and key list inside."""
        content = struct.pack('>Q', 12345) + struct.pack(
            '<IB', 64, 0) + os.urandom(64)
        path = self.put(tarsnap.key_text(content))
        self.check_refused('original Tarsnap', tarsnap.key_load, path,
                           no_passphrase)
        closed = tarsnap.scrypt_encrypt(content, b'pw', 1 << 20, 0.01)
        path = self.put(tarsnap.key_text(closed))
        self.check_refused('original Tarsnap', tarsnap.key_load, path,
                           lambda path: b'pw')


def scrypt_header(log_n, r, p):
    """The part of a scrypt(1) file that says what opening it costs."""
    head = struct.pack('>7sBII', b'scrypt\0', log_n, r, p) + SALT
    return head + tarsnap.sha256(head)[:16]


class Passphrases(KeyFileTest):
    def setUp(self):
        super().setUp()
        self.key = samples.full_key()

    def closed(self, passphrase=b'pass \xff'):
        return self.write(self.key, passphrase, 1 << 20, 0.01)

    def test_right_and_wrong(self):
        path, asked = self.closed(), []
        key = tarsnap.key_load(path, lambda p: asked.append(p) or b'pass \xff')
        self.assertEqual(asked, [path])
        self.assertEqual(tarsnap.key_encode(key),
                         tarsnap.key_encode(self.key))
        for wrong in (b'', b'pass', b'pass \xff\n', b'PASS \xff'):
            self.check_refused('incorrect', tarsnap.key_load, path,
                               lambda path: wrong)

    def test_nothing_shows_through(self):
        content = tarsnap.key_untext(self.read(self.closed()), '')
        plain = tarsnap.key_encode(self.key)
        for at in range(0, len(plain) - 8, 8):
            self.assertNotIn(plain[at:at + 8], content)

    def test_salt_is_fresh(self):
        """A salt used twice is a keystream used twice."""
        one, two = (tarsnap.key_untext(self.read(self.closed()), '')
                    for _ in range(2))
        self.assertNotEqual(one[16:48], two[16:48])
        self.assertFalse(any(one[at:at + 16] == two[at:at + 16]
                             for at in range(16, len(one) - 16)))

    def test_damaged_anywhere(self):
        content = tarsnap.key_untext(self.read(self.closed()), '')
        with mock.patch.object(tarsnap, 'scrypt_speed', lambda: 3e-9):
            for at in range(7, len(content)):
                damaged = bytearray(content)
                damaged[at] ^= 1 << at % 8
                self.check_refused('F', tarsnap.scrypt_decrypt, bytes(damaged),
                                   lambda: b'pass \xff', 'F')
            for end in range(7, len(content), 31):
                self.check_refused('F', tarsnap.scrypt_decrypt, content[:end],
                                   lambda: b'pass \xff', 'F')

    def test_hostile_parameters_cost_nothing(self):
        def derive(*args):
            raise AssertionError('worked for a hostile file')
        hostile = [(63, 8, 1), (40, 8, 1), (24, 1 << 20, 1), (0, 8, 1),
                   (64, 8, 1), (255, 8, 1), (10, 0, 1), (10, 8, 0),
                   (10, 1 << 15, 1 << 15), (1, 1, (1 << 30) - 1),
                   (1, 1, 1 << 28), (10, (1 << 30) - 1, 1), (16, 1, 1),
                   (24, 8, 1 << 20), (10, 0xffffffff, 0xffffffff)]
        with mock.patch.object(tarsnap, 'scrypt_speed', lambda: 3e-9), \
                mock.patch.object(tarsnap, 'scrypt_derive', derive), \
                mock.patch.object(tarsnap, 'memory_size', lambda: 1 << 34):
            for numbers in hostile:
                path = self.put(tarsnap.key_text(
                    scrypt_header(*numbers) + bytes(200)))
                with self.subTest(numbers=numbers):
                    self.check_refused(path, tarsnap.key_load, path,
                                       no_passphrase)
            for numbers in ((0, 8, 1), (10, 8, 0), (16, 1, 1), (64, 8, 1)):
                path = self.put(tarsnap.key_text(
                    scrypt_header(*numbers) + bytes(200)))
                self.check_refused('impossible', tarsnap.key_load, path,
                                   no_passphrase, force=True)

    def test_force_lifts_the_limits(self):
        path = self.closed()
        ask = mock.Mock(return_value=b'pass \xff')
        with mock.patch.object(tarsnap, 'memory_size', lambda: 1 << 20):
            self.check_refused('--force-resources', tarsnap.key_load, path,
                               ask)
            ask.assert_not_called()
            self.assertTrue(tarsnap.key_load(path, ask, True).can(R))

    def test_cost_is_what_was_asked_for(self):
        with mock.patch.object(tarsnap, 'scrypt_speed', lambda: 1e-6), \
                mock.patch.object(tarsnap, 'scrypt_derive',
                                  lambda *args: bytes(64)):
            for memory, seconds, log_n in ((None, 1.1, 10), (None, 17, 14),
                                           (20 << 20, 10 ** 6, 14),
                                           (1, 100, 10)):
                content = tarsnap.scrypt_encrypt(b'', b'', memory, seconds)
                self.assertEqual(content[7], log_n)

    def test_derive_is_rfc_7914(self):
        self.assertEqual(
            tarsnap.scrypt_derive(b'pleaseletmein', b'SodiumChloride', 14, 8,
                                  1).hex()[:32],
            '7023bdcb3afd7348461c06cd81fd38eb')


@unittest.skipUnless(shutil.which('scrypt'), 'no scrypt program')
class RealScrypt(KeyFileTest):
    """The scrypt utility opens what we close, and the other way round."""

    def setUp(self):
        super().setUp()
        self.key = samples.full_key()
        self.word = self.put(b'correct horse\n')

    def test_it_opens_ours(self):
        path = self.write(self.key, b'correct horse', 1 << 22, 0.1)
        out = subprocess.run(
            "grep -v '^#' '%s' | base64 -d | "
            "scrypt dec --passphrase file:'%s' -" % (path, self.word),
            shell=True, check=True, stdout=subprocess.PIPE).stdout
        self.assertEqual(out, tarsnap.key_encode(self.key))

    def test_it_refuses_a_wrong_passphrase(self):
        path = self.write(self.key, b'incorrect horse', 1 << 20, 0.01)
        content = self.put(tarsnap.key_untext(self.read(path), path))
        done = subprocess.run(
            ['scrypt', 'dec', '--passphrase', 'file:' + self.word, content],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stdout, b'')

    def test_we_open_its(self):
        for numbers in ((10, 8, 1), (12, 8, 3), (11, 16, 2), (15, 1, 1)):
            with self.subTest(numbers=numbers):
                done = subprocess.run(
                    ['scrypt', 'enc', '--logN', str(numbers[0]), '-r',
                     str(numbers[1]), '-p', str(numbers[2]), '--passphrase',
                     'file:' + self.word, '-'], check=True,
                    input=tarsnap.key_encode(self.key),
                    stdout=subprocess.PIPE)
                path = self.put(tarsnap.key_text(done.stdout))
                key = tarsnap.key_load(path, lambda path: b'correct horse')
                self.assertEqual(key.sign_privs, self.key.sign_privs)
                self.check_refused('incorrect', tarsnap.key_load, path,
                                   lambda path: b'correct horse\n')


class Sources(KeyFileTest):
    def test_methods(self):
        one = self.put(b'from a file\r\n')
        bare = self.put(b'no newline')
        with mock.patch.dict(os.environ, {'KEY_WORD': 'fr\udcffom'}):
            for method, expected in (('env:KEY_WORD', b'fr\xffom'),
                                     ('file:' + one, b'from a file'),
                                     ('file:' + bare, b'no newline')):
                self.assertEqual(tarsnap.ask_passphrase(method)('K'),
                                 expected)

    def test_refused(self):
        two = self.put(b'one\ntwo\n')
        for method, words in (('file:' + two, 'one line'),
                              ('file:' + self.path, 'No such file'),
                              ('env:SURELY_NOT_SET', 'SURELY_NOT_SET')):
            self.check_refused(words, tarsnap.ask_passphrase(method), 'K')
        for method in ('', 'env', 'env:', 'file:', 'dev:', 'dev:null', 'x:y',
                       'file'):
            self.check_refused('method', tarsnap.ask_passphrase, method)


if __name__ == '__main__':
    unittest.main()
