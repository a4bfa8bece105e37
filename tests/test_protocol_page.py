# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The examples of tarsnap-protocol(7), and its tables of numbers, are true.

Frames and store objects are taken apart by formatreader, which knows the
pages only, and by the programs; the tables are compared with the constants of
both programs, which are compared with each other.
"""

import hashlib
import os
import re
import sys
import unittest
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

from cryptography.hazmat.primitives.asymmetric import ed25519   # noqa: E402

import format_examples                                      # noqa: E402
import formatreader as fr                                   # noqa: E402
import tarsnap                                              # noqa: E402
import tarsnapd                                             # noqa: E402


def table(text, start, end):
    """The rows [cells] of the column list between two lines of the page."""
    part = text[text.index(start):]
    part = part[:part.index(end, len(start))]
    return [[cell.strip() for cell in line[4:].split(' Ta ')]
            for line in part.splitlines()
            if line.startswith('.It ') and line[4].isdigit()]


def check(public, signature, message):
    ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature,
                                                              message)


class Page(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(format_examples.PROTOCOL) as file:
            cls.text = file.read()
        cls.displays = format_examples.blocks(format_examples.PROTOCOL)
        formats = format_examples.blocks(format_examples.FORMAT)
        cls.key = fr.key_fields(formats['example', 'keyfile'])
        cls.chunk = bytes.fromhex(formats['example', 'chunk'])
        cls.chunk_name = bytes.fromhex(format_examples.values(
            formats['values', 'chunk'])['name'][0])

    def block(self, name):
        return bytes.fromhex(self.displays['example', name])

    def said(self, name):
        return format_examples.values(self.displays['values', name])

    def frame(self, name, kind):
        """The body of an example frame."""
        fields = fr.Fields(self.block(name))
        length = fields.number(32)
        self.assertEqual(fields.number(8), kind)
        fields.number(32)
        self.assertEqual(len(fields.data), length)
        return fields.data


class Numbers(Page):
    """Types, errors, ceilings: page, client and server say the same."""

    def same(self, rows, prefix=''):
        for number, name, *_ in rows:
            with self.subTest(name):
                self.assertEqual(getattr(tarsnap, prefix + name), int(number))
                self.assertEqual(getattr(tarsnapd, prefix + name),
                                 int(number))

    def test_types(self):
        rows = table(self.text, '.Sh REQUESTS', '.Pp')
        self.assertEqual([int(row[0]) for row in rows], list(range(1, 20)))
        self.same(rows)
        rows = table(self.text, '.Ss Answers', '.Pp')
        self.assertEqual([int(row[0]) for row in rows], list(range(128, 146)))
        self.same(rows)

    def test_errors(self):
        rows = table(self.text, '.Ss Errors', '.Sh ')
        self.assertEqual([int(row[0]) for row in rows], list(range(1, 17)))
        self.same(rows, 'E_')
        errors = [name for name in vars(tarsnapd) if name.startswith('E_')]
        self.assertEqual(len(errors), 16)

    def test_ceilings(self):
        rows = table(self.text, '.Ss Ceilings', '.Pp\n.Em frame')
        page = {row[1]: int(row[0]) for row in rows}
        self.assertEqual(page, tarsnap.CEILING)
        self.assertEqual(page, tarsnapd.CEILING)

    def test_roles_of_requests(self):
        for number, name, roles, _ in table(self.text, '.Sh REQUESTS', '.Pp'):
            self.assertEqual(tarsnapd.REQUESTS[int(number)][1],
                             roles.strip('-'), name)

    def test_other_constants(self):
        for name in ('PROTOCOL', 'KIND_ROLE', 'OPEN', 'PARTIAL', 'COMPLETE',
                     'TRANSPORT_TLS', 'TRANSPORT_STDIO', 'TRANSPORT_DIR',
                     'ROLE_READ', 'ROLE_WRITE', 'ROLE_DELETE', 'ROLE_NUKE',
                     'CHUNK', 'INDEX', 'RECORD', 'RECIPIENTS'):
            self.assertEqual(getattr(tarsnap, name), getattr(tarsnapd, name),
                             name)
        self.assertIn('port %d by default' % tarsnapd.PORT, self.text)


class FromThePage(Page):

    def test_statement_and_auth(self):
        said = self.said('statement')
        fields = fr.Fields(self.frame('statement', 128))
        version, identity = fields.number(16), fields.bytes(32)
        store, serial = fields.bytes(16), fields.bytes(8)
        nonce, signature = fields.bytes(32), fields.bytes(64)
        self.assertEqual((version, fields.data), (1, b''))
        self.assertEqual(identity.hex(), said['identity'][0])
        self.assertEqual(hashlib.sha256(identity).hexdigest(),
                         said['fingerprint'][0])
        self.assertEqual(self.key[4], hashlib.sha256(identity).digest())
        self.assertEqual(self.key[2], store)
        check(identity, signature,
              b'tarsnap-server-1\0' + store + serial + bytes(32))

        fields = fr.Fields(self.frame('auth', 4))
        head, mine = fields.bytes(11), fields.bytes(32)
        self.assertEqual(head, b'\0\1' + self.key[1] + b'\2')
        check(self.key[6][32:64], fields.bytes(64),
              b'tarsnap-auth-1\0' + b'\0\1' + b'\2' + store + bytes(32)
              + self.key[1] + b'\2' + nonce + mine)
        self.assertEqual(fields.data, b'')

    def test_register(self):
        said = self.said('register')
        first, second = self.block('register-one'), self.block('register-two')
        self.assertEqual(first[33:].decode(), said['user'][0])
        self.assertEqual(first[32], len(first) - 33)
        log_n, r, p = map(int, said['cost'][0].split())
        derived = hashlib.scrypt(
            said['password'][0].encode(),
            salt=bytes.fromhex(said['salt'][0]), n=1 << log_n, r=r, p=p,
            maxmem=1 << 26, dklen=32)
        client = fr.mac(derived, b'client')
        stored = hashlib.sha256(client).digest()
        self.assertEqual(stored.hex(), said['stored'][0])
        mask = fr.mac(stored, self.frame('statement', 128) + first
                      + second[:-32])
        self.assertEqual(second[-32:],
                         bytes(a ^ b for a, b in zip(client, mask)))
        self.assertEqual(second[1 + second[0]:-32], self.key[6])

    def test_segment(self):
        data = self.block('segment')
        fields = fr.Fields(data)
        self.assertEqual(fields.bytes(18), b'tarsnap-segment-1\0')
        head = fields.bytes(41)
        self.assertEqual(head[:5], b'tse1c')
        self.assertEqual(head[5:37], self.chunk_name)
        crc = fields.number(32)
        block = fields.bytes(int.from_bytes(head[37:], 'big'))
        self.assertEqual(block, self.chunk)
        self.assertEqual(zlib.crc32(head + block), crc)
        at = len(data) - len(fields.data)
        row = fields.bytes(77)
        self.assertEqual(row, self.chunk_name + b'c' + (63).to_bytes(8, 'big')
                         + len(block).to_bytes(4, 'big')
                         + hashlib.sha256(block).digest())
        self.assertEqual((fields.number(64), fields.number(32)), (at, 1))
        self.assertEqual(fields.bytes(32), hashlib.sha256(row).digest())
        self.assertEqual(fields.data, b'tarsnap-segend-1')

    def test_log_entry(self):
        data = self.block('log')
        self.assertEqual(data[-32:], hashlib.sha256(data[:-32]).digest())
        fields = fr.Fields(data[:-32])
        self.assertEqual(fields.bytes(16), b'tarsnap-log-1\0\0\0')
        self.assertEqual(fields.bytes(8), self.key[1])
        self.assertEqual((fields.number(64), fields.bytes(32)),
                         (1, bytes(32)))
        fields.number(64)
        self.assertEqual(fields.number(32), 0)
        self.assertEqual(fields.number(32), 1)
        key = fields.bytes(fields.number(16)).decode()
        segment = self.block('segment')
        self.assertTrue(re.fullmatch('seg/%s/[0-9a-f]{32}/000001-%s' % (
            self.key[1].hex(), segment[-48:-32].hex()), key))
        self.assertEqual(fields.number(64), len(segment))
        self.assertEqual(fields.bytes(32), segment[-48:-16])
        self.assertEqual((fields.number(32), fields.bytes(1)), (1, b'\0'))
        self.assertEqual(fields.number(64), 1)
        self.assertEqual(fields.number(64), len(self.chunk))
        self.assertEqual((fields.number(32), fields.data), (0, b''))


class ByThePrograms(Page):

    def test_client_believes_the_statement(self):
        statement = tarsnap.Statement(self.channel())
        self.assertEqual(statement.fingerprint().hex(),
                         self.said('statement')['fingerprint'][0])
        channel = self.channel()
        channel.body = channel.body[:-1] + b'\0'
        with self.assertRaises(tarsnap.RemoteError):
            tarsnap.Statement(channel)

    def channel(self):
        class Link:
            cert_hash = bytes(32)

        class Channel:
            server = 'example'
            link = Link()
            body = self.frame('statement', 128)

            def wait_statement(self):
                return self.body

        return Channel()

    def test_server_believes_the_proof(self):
        first, second = self.block('register-one'), self.block('register-two')
        transcript = self.frame('statement', 128) + first + second[:-32]
        stored = bytes.fromhex(self.said('register')['stored'][0])
        self.assertTrue(tarsnapd.login_check(stored, transcript,
                                             second[-32:]))
        self.assertFalse(tarsnapd.login_check(stored, transcript + b'x',
                                              second[-32:]))

    def test_server_reads_its_objects(self):
        data = self.block('log')
        machine = int.from_bytes(self.key[1], 'big')
        entry = tarsnapd.log_decode(machine, 1, data)
        self.assertEqual(tarsnapd.log_encode(entry), data)
        segment = self.block('segment')
        self.assertEqual(entry.segments[0][1], len(segment))
        steps = tarsnapd.segment_load(entry.segments[0][0], len(segment))
        _, _, offset, length = next(steps)
        with self.assertRaises(StopIteration) as done:
            steps.send(segment[offset:offset + length])
        self.assertEqual(done.exception.value.table_hash,
                         entry.segments[0][2])

    def test_server_takes_the_blocks(self):
        formats = format_examples.blocks(format_examples.FORMAT)
        for name, cls in (('chunk', b'c'), ('page', b'i'), ('list', b'i'),
                          ('record', b'a')):
            block = bytes.fromhex(formats['example', name])
            view = tarsnapd.block_check(cls, block)
            self.assertEqual(view < len(block), True)
            with self.assertRaises(tarsnapd.Refused):
                tarsnapd.block_check(cls, block + b'\0')
        commit = bytes.fromhex(formats['example', 'commit'])
        self.assertEqual(tarsnapd.commit_decode(commit).hash.hex(),
                         format_examples.values(
                             formats['values', 'commit'])['hash'][0])
        self.assertEqual(
            tarsnapd.genesis(int.from_bytes(self.key[1], 'big'), self.key[2],
                             self.key[6]), fr.genesis(self.key))

    def test_examples_are_up_to_date(self):
        made = format_examples.ProtocolExamples().make()
        for which, text in made.items():
            # These hold a deflated part, which may differ with the zlib.
            if which[1] in ('segment', 'log'):
                continue
            with self.subTest(which):
                self.assertEqual(text, self.displays[which])


if __name__ == '__main__':
    unittest.main()
