# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Every request for every set of keys: served, or refused with ROLE."""

import itertools
import os
import unittest

from rawclient import (
    ABORT_KIND, COMPLETE, D, DELETE_KIND, N, NUKE_KIND, R, W, ZERO, Client,
    Embedded, Error, Host, Stdio, block, names_body, put, server_directory,
    sha, u16, u64, tarsnapd)

LETTER = {R: 'r', W: 'w', D: 'd', N: 'n'}
SUBSETS = [roles for count in range(5)
           for roles in itertools.combinations((R, W, D, N), count)]

# Who may ask; written down from tarsnap-protocol(7), not from the program.
TABLE = {
    'HELLO': ('', 'any'),
    'STAT': ('rwdn', 'some'),
    'CHANGES': ('rwdn', 'some'),
    'LIST all': ('rd', 'some'),
    'LIST ids': ('rwd', 'some'),
    'GET whole': ('r', 'some'),
    'GET refs': ('rd', 'some'),
    'GET look': ('rwd', 'some'),
    'HAS': ('w', 'some'),
    'BEGIN write': ('w', 'some'),
    'BEGIN delete': ('d', 'some'),
    'PUT': ('w', 'some'),
    'WITHDRAW': ('w', 'some'),
    'DELETE': ('d', 'some'),
    'GET kept': ('d', 'some'),
    'REVIVE': ('d', 'some'),
    'ACCOUNT': ('rwdn', 'some'),
    'CHECKPOINT': ('w', 'some'),
    'COMMIT write': ('w', 'some'),
    'COMMIT delete': ('d', 'some'),
    'COMMIT abort': ('w', 'some'),
    'ABORT write': ('w', 'some'),
    'ABORT delete': ('d', 'some'),
    'NUKE': ('n', 'some'),
}


class Roles(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        client = Client(Embedded(self.path))
        self.host = Host(client)
        client.auth(self.host.machine, self.host.keys, R, W, D, N)
        _, self.record, self.names = self.host.backup(client, 'one')
        client.close()

    def client(self, roles):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        for role in roles:
            client.auth(self.host.machine, self.host.keys, role)
        return client

    def begin(self, client, kind):
        """Begin; refusals are no matter here, the next request is."""
        tid = os.urandom(16)
        try:
            self.host.begin(client, tid, kind=kind)
        except Error as e:
            self.assertEqual(e.code, 'ROLE')
        return tid

    def ask(self, client, what):
        """Send one request and return 'OK' or the error's code."""
        name, _, variant = what.partition(' ')
        kind = DELETE_KIND if variant == 'delete' else 1
        try:
            if name in ('PUT', 'WITHDRAW', 'DELETE'):
                self.unanswered(client, name)
            elif name == 'BEGIN':
                self.host.begin(client, os.urandom(16), kind=kind)
            elif name in ('COMMIT', 'CHECKPOINT', 'ABORT', 'NUKE'):
                self.decide(client, name, variant, kind)
            else:
                self.look(client, name, variant)
        except Error as e:
            return e.code
        return 'OK'

    def look(self, client, name, variant):
        if name == 'REVIVE':
            self.begin(client, DELETE_KIND)
        body = {
            'HELLO': u16(1), 'STAT': b'', 'CHANGES': u64(0) + ZERO + b'\1',
            'LIST all': u16(0), 'LIST ids': u16(1) + ZERO,
            'GET whole': b'\3' + names_body([self.record]),
            'GET kept': b'\5' + names_body([self.record]),
            'REVIVE': names_body([]), 'ACCOUNT': b'\1',
            'GET look': b'\0' + names_body([self.record]),
            'GET refs': b'\1' + names_body([self.record]),
            'HAS': names_body([ZERO]),
        }[(name + ' ' + variant).strip()]
        if name in ('STAT', 'HAS', 'HELLO', 'ACCOUNT'):
            client.call(name, body)
        else:
            client.stream(name, body)

    def unanswered(self, client, name):
        self.begin(client, DELETE_KIND if name == 'DELETE' else 1)
        if name == 'PUT':
            put(client, block('c', 'new'))
        else:
            client.send(name, names_body(self.names))
        client.wait_received(1)

    def decide(self, client, name, variant, kind):
        tid = self.begin(client, kind)
        kind = {'abort': ABORT_KIND}.get(variant, kind)
        kind = NUKE_KIND if name == 'NUKE' else kind
        if name == 'ABORT':
            client.call('ABORT')
        else:
            self.host.commit(client, tid, frame=name, kind=kind)

    def test_matrix(self):
        for what, (letters, rule) in TABLE.items():
            for roles in SUBSETS:
                mine = {LETTER[role] for role in roles}
                good = rule == 'any' or mine & set(letters)
                client = self.client(roles)
                with self.subTest(request=what, keys=''.join(sorted(mine))):
                    bad = 'ROLE'
                    if what.startswith('ABORT') and mine & set('wd'):
                        bad = 'EXPIRED'     # it has begun nothing
                    self.assertEqual(self.ask(client, what),
                                     'OK' if good else bad)
                if what == 'NUKE' and good:
                    self.host.backup(self.client((W,)), 'one')

    def test_all_requests_are_in_the_table(self):
        names = {what.partition(' ')[0] for what in TABLE}
        names |= {'REGISTER1', 'REGISTER2', 'AUTH'}
        self.assertEqual({getattr(tarsnapd, name) for name in names},
                         set(tarsnapd.REQUESTS))

    def test_delete_key_sees_no_rows_and_no_chunks(self):
        client = self.client((D,))
        client.send('GET', b'\1' + names_body([self.names[0], self.record]))
        kind, body = client.next(errors=True)
        self.assertEqual((kind, Error(body).code), ('ERROR', 'ROLE'))
        kind, body = client.next()
        self.assertEqual(kind, 'BLOCK')
        whole = block('a', 'one')[2]
        self.assertTrue(whole.startswith(body[32:]))
        self.assertLess(len(body) - 32, len(whole) - 100)

    def test_a_key_proves_its_own_role_only(self):
        for role, signer in itertools.permutations((R, W, D, N), 2):
            client = self.client(())
            body = client.auth_body(self.host.machine, self.host.keys, role,
                                    signer)
            with self.assertRaises(Error) as caught:
                client.call('AUTH', body)
            self.assertEqual(caught.exception.code, 'ROLE')

    def test_a_recorded_proof_is_good_for_one_connection(self):
        first, second = self.client(()), self.client(())
        body = first.auth_body(self.host.machine, self.host.keys, R)
        with self.assertRaises(Error) as caught:
            second.call('AUTH', body)
        self.assertEqual(caught.exception.code, 'ROLE')

    def test_one_connection_one_machine(self):
        client = self.client(())
        other = Host(client)
        client.auth(other.machine, other.keys, R)
        with self.assertRaises(Error) as caught:
            client.auth(self.host.machine, self.host.keys, W)
        self.assertEqual(caught.exception.code, 'BAD')

    def test_limits_of_a_forced_command(self):
        link = Stdio(self.path, '--machine', '%016x' % self.host.machine,
                     '--roles', 'rw')
        self.addCleanup(link.close)
        client = Client(link)
        client.auth(self.host.machine, self.host.keys, R, W)
        for role in (D, N):
            with self.assertRaises(Error) as caught:
                client.auth(self.host.machine, self.host.keys, role)
            self.assertEqual(caught.exception.code, 'ROLE')
        with self.assertRaises(Error) as caught:
            Host(client)        # registers nobody without a password
        self.assertEqual(caught.exception.code, 'LOGIN')

    def test_limits_to_a_machine(self):
        client = Client(Embedded(self.path, transport='stdio',
                                 machine=self.host.machine ^ 1))
        self.addCleanup(client.close)
        with self.assertRaises(Error) as caught:
            client.auth(self.host.machine, self.host.keys, R)
        self.assertEqual(caught.exception.code, 'ROLE')

    def test_a_machine_sees_nothing_of_another(self):
        client = self.client(())
        other = Host(client)
        client.auth(other.machine, other.keys, R, W, D, N)
        self.assertEqual(client.call('HAS', names_body(self.names))[1],
                         b'\0')
        client.send('GET', b'\3' + names_body(self.names[:1]))
        kind, body = client.next(errors=True)
        self.assertEqual(Error(body).code, 'NOBLOCK')
        self.assertEqual(client.stream('LIST', u16(0)), [])

    def test_write_learns_only_of_archives_it_names(self):
        client = self.client((W,))
        archive = sha(b'idone')
        answers = client.stream('LIST', u16(2) + ZERO + archive)
        self.assertEqual([kind for kind, _ in answers],
                         ['COMMIT_OBJECT', 'ARCHIVES'])
        row = answers[1][1]
        self.assertEqual(row[:82], u16(1) + archive + self.record + bytes(16))
        self.assertEqual(row[82], COMPLETE)


if __name__ == '__main__':
    unittest.main()
