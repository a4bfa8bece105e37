# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What earlier versions wrote is read by this one: stores, their indexes, key
files with and without a passphrase, cache directories.  See corpus_make.py.
"""

import json
import os
import shutil
import tarfile
import unittest

import lab
import tarsnap
import tarsnapd
from corpus_make import (
    CORPUS, PASSPHRASE, PASSWORD, USER, operator, portable)
from rawclient import Client, Embedded, Keys, Serve

ROLE_NUMBERS = {'r': 1, 'w': 2, 'd': 3, 'n': 4}
VERSIONS = sorted(os.listdir(CORPUS))


class Place:
    """A copy of one version's corpus, to do anything with."""

    def __init__(self, case, version):
        self.root = os.path.realpath(lab.tempfile.mkdtemp(prefix='corpus-'))
        case.addCleanup(shutil.rmtree, self.root, True)
        self.case = case
        for name in ('server', 'cache', 'keys'):
            with tarfile.open(os.path.join(
                    CORPUS, version, name + '.tar.xz')) as file:
                for member in file:
                    assert member.name.split('/')[0] == name
                    assert '..' not in member.name
                    member.uid, member.gid = os.geteuid(), os.getegid()
                    file.extract(member, self.root)
        with open(os.path.join(CORPUS, version, 'expected.json')) as file:
            self.expected = json.load(file)
        self.server = self.path('server')
        self.machine = self.expected['machine']
        os.mkdir(self.path('none'), 0o700)
        self.count = 0

    def path(self, *names):
        return os.path.join(self.root, *names)

    def run(self, *args, roles='rwdn', cache='cache', status=0):
        """A run of the client with one of the keys."""
        where = ['--cachedir', self.path(cache)] if cache else []
        result = lab.run(['--no-default-config', '--keyfile',
                          self.path('keys', roles), '--server', self.server,
                          *where, *args])
        self.case.assertEqual(result.status, status, result)
        return result

    def names(self, **options):
        return sorted(self.run('--list-archives', cache=None,
                               **options).out.splitlines())

    def check(self, archive, roles='r'):
        """An archive is what it was."""
        self.count += 1
        out = self.path('out%d' % self.count)
        os.mkdir(out)
        self.run('-x', '-p', '--no-same-owner', '-f', archive, '-C', out,
                 roles=roles, cache=None)
        found = json.loads(json.dumps(portable(lab.snapshot(out))))
        wanted = self.expected['archives'][archive]
        for rows in (found, wanted):
            rows[''].update(mode=0)
        self.case.assertEqual(found, wanted)
        shutil.rmtree(out)


class Corpus(unittest.TestCase):

    def each(self):
        for version in VERSIONS:
            with self.subTest(version):
                yield Place(self, version)

    def test_this_version_is_in_it(self):
        self.assertIn(tarsnapd.VERSION, VERSIONS)
        size = sum(os.path.getsize(os.path.join(top, name))
                   for top, _, names in os.walk(CORPUS) for name in names)
        self.assertLess(size, 200000 * len(VERSIONS))

    def test_restore_and_verify(self):
        for place in self.each():
            self.assertEqual(place.run('--list-archives', '-v',
                                       cache=None).out,
                             place.expected['list'])
            for archive in ('first', 'second', 'usual'):
                place.check(archive)
            for archive in place.names():
                place.run('--verify', '-f', archive, cache=None, status=(
                    2 if archive.endswith('.part') else 0))

    def test_cache_directory(self):
        for place in self.each():
            self.assertEqual(place.run('--print-stats').out,
                             place.expected['stats'])
            os.makedirs(place.path('tree'))
            with open(place.path('tree', 'new'), 'w') as file:
                file.write('new')
            place.run('-c', '-f', 'new', '-C', place.path('tree'), '.')
            for archive in ('new', 'second'):
                place.run('-d', '-f', archive)
            self.assertNotIn('second', place.names())
            for archive in ('first', 'usual'):
                place.check(archive)

    def test_fsck_makes_the_same_statistics(self):
        for place in self.each():
            place.run('--fsck', cache='none')
            self.assertEqual(place.run('--print-stats', cache='none').out,
                             place.expected['stats'])

    def test_deleted_and_undeleted(self):
        for place in self.each():
            place.run('--undelete', '-f', 'gone', roles='d', cache='none',
                      status=1)         # that cache knows nothing yet
            place.run('--fsck', roles='d', cache='none')
            place.run('--undelete', '-f', 'gone', roles='d', cache='none')
            place.check('gone')
            left = place.names(roles='d')
            for archive in left:
                place.run('-d', '-f', archive, roles='d', cache='none')
            self.assertEqual((place.names(), len(left)), ([], 5))

    def test_index_and_rebuild(self):
        for place in self.each():
            for _ in range(2):
                self.assertEqual(operator(
                    'index-dump', place.server, place.machine),
                    place.expected['dump'])
                operator('rebuild', place.server)

    def test_scrub_clean_and_stats(self):
        for place in self.each():
            for _ in range(2):          # its own round goes on, then another
                operator('scrub', place.server)
            operator('clean', place.server, '--used', '99')
            self.assertEqual(json.loads(operator(
                'stats', place.server, '--json'))['machines'], 2)
            place.check('first')

    def test_key_files(self):
        for place in self.each():
            found = os.listdir(place.path('keys'))
            self.assertEqual(len(found), 30)
            for name in found:
                key = tarsnap.key_load(place.path('keys', name),
                                       lambda _: PASSPHRASE.encode())
                roles = name.partition('.')[0]
                self.assertEqual('%016x' % key.machine, place.machine)
                for letter, number in ROLE_NUMBERS.items():
                    self.assertEqual(key.can(number), letter in roles, name)
            for roles in ('r', 'rd', 'rwdn'):
                place.check('usual', roles)
            place.run('-t', '-f', 'usual', '--passphrase',
                      'env:CORPUS', roles='r.phrase', cache=None, status=1)
            os.environ['CORPUS'] = PASSPHRASE
            self.addCleanup(os.environ.pop, 'CORPUS', None)
            place.run('-t', '-f', 'usual', '--passphrase', 'env:CORPUS',
                      roles='r.phrase', cache=None)
            for roles in ('w', 'n'):
                place.run('-t', '-f', 'usual', roles=roles, cache=None,
                          status=1)

    def test_accounts_identity_and_canary(self):
        for place in self.each():
            self.assertEqual(operator('fingerprint', place.server).strip(),
                             place.expected['fingerprint'])
            self.assertIn('machine %s' % place.machine,
                          operator('user', place.server, 'show', USER))
            # Anywhere but here, and as clients come.
            serve = Serve(place.server)
            self.addCleanup(serve.kill)
            client = serve.client()
            client.register(Keys(), USER, PASSWORD)
            client.close()
            line = operator('check', place.server, '--server',
                            '127.0.0.1:%d' % serve.port)
            self.assertIn('OK', line)
            serve.stop()

    def test_a_session_of_then_goes_on(self):
        """What a raw client of the protocol is told has not changed."""
        for place in self.each():
            key = tarsnap.key_load(place.path('keys', 'rwdn'), None)
            client = Client(Embedded(place.server))
            keys = Keys.__new__(Keys)
            keys.private = {role: tarsnap_private(key, role)
                            for role in key.sign_privs}
            n, head, archives, _ = client.auth(key.machine, keys, 1, 2, 3, 4)
            commits = client.stream('CHANGES', bytes(40) + b'\0')
            self.assertEqual(len(commits), n)
            self.assertEqual(tarsnap.sha256(commits[-1][1][8:]), head)
            self.assertEqual(archives, 4)
            client.close()


def tarsnap_private(key, role):
    from cryptography.hazmat.primitives.asymmetric import ed25519
    return ed25519.Ed25519PrivateKey.from_private_bytes(key.sign_privs[role])


if __name__ == '__main__':
    unittest.main()
