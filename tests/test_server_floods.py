# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Clients that send without end fill neither memory nor disk, and what they
do does not keep a legitimate client from its backup.
"""

import _ssl
import ctypes
import hashlib
import os
import select
import socket
import ssl
import struct
import threading
import time
import unittest

import rawclient
from rawclient import (
    D, DELETE_KIND, R, W, Client, Closed, Embedded, Error, Host, Serve,
    block, get, names_body, part, put, server_directory, tarsnapd)

MIB = 1 << 20
SMALL = b'c' + b'\1c\1' + bytes(32) + part(1, bytes(28))


def frame(kind, body=b'', rid=1):
    return struct.pack('>IBI', len(body), kind, rid) + body


def name(number):
    return hashlib.sha256(b'%d' % number).digest()


class Floods(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.serve = Serve(self.path)
        self.addCleanup(self.serve.kill)
        client = self.serve.client()
        self.host = Host(client, user='joe', password=b'pw')
        client.close()

    def authed(self):
        client = self.serve.client()
        self.addCleanup(client.close)
        client.auth(self.host.machine, self.host.keys, R, W, D)
        return client

    def memory(self, what='VmRSS'):
        with open('/proc/%d/status' % self.serve.child.pid) as file:
            for line in file:
                if line.startswith(what + ':'):
                    return int(line.split()[1]) << 10
        return 0

    def put_many(self, client, count):
        """Put so many tiny blocks; their names."""
        names = [name(number) for number in range(count)]
        for at in range(0, count, 2000):
            client.link.send(b''.join(frame(11, one + SMALL)
                                      for one in names[at:at + 2000]))
        client.wait_received(count)
        return names

    def spooled(self):
        return sum(os.path.getsize(os.path.join(where, file))
                   for where, _, files in os.walk(self.path)
                   for file in files)

    def test_deletes_of_names_that_are_made_up(self):
        """32 MB of them: neither kept in memory nor on the disk."""
        client = self.authed()
        self.host.backup(client, 'one')
        before, disk = self.memory(), self.spooled()
        self.host.begin(client, os.urandom(16), kind=DELETE_KIND)
        with self.assertRaises(Error) as caught:
            for number in range(256):
                client.send('DELETE', names_body(
                    [os.urandom(32) for _ in range(4096)]))
                if number % 16 == 15:
                    client.call('STAT')
        self.assertEqual(caught.exception.code, 'MISMATCH')
        self.assertLess(self.memory(), before + 8 * MIB)
        self.assertLess(self.spooled(), disk + 4 * MIB)

    def test_withdrawals_of_what_was_never_put(self):
        client = self.authed()
        before, disk = self.memory(), self.spooled()
        self.host.begin(client, os.urandom(16))
        with self.assertRaises((Error, Closed)) as caught:
            for number in range(1024):
                client.send('WITHDRAW', names_body(
                    [name(number)] * 4096))
                if number % 16 == 15:
                    client.call('STAT')
        if isinstance(caught.exception, Error):
            self.assertEqual(caught.exception.code, 'BAD')
        self.assertLess(self.memory(), before + 24 * MIB)
        self.assertLess(self.spooled(), disk + 48 * MIB)

    def test_a_transaction_of_very_many_blocks(self):
        """200 000 of them, never committed: their table is on the disk."""
        client = self.authed()
        self.host.begin(client, os.urandom(16))
        self.put_many(client, 30000)
        before = self.memory()
        self.put_many(client, 170000)
        self.assertLess(self.memory(), before + 48 * MIB)
        self.assertLess(self.memory('VmHWM'), 150 * MIB)

    def test_many_names_listed_are_deleted(self):
        """What is kept in a file says the same as a set would."""
        client = self.authed()
        tid = os.urandom(16)
        self.host.begin(client, tid)
        names = self.put_many(client, 20000)
        client.send('WITHDRAW', names_body(names[:4000]))
        client.send('PUT', names[7] + SMALL)
        client.send('PUT', names[9999] + SMALL)         # twice
        stays = names[4000:] + [names[7], names[9999]]
        self.host.commit(client, tid, puts=stays)
        tid = os.urandom(16)
        self.host.begin(client, tid, kind=DELETE_KIND)
        gone = sorted(set(stays))
        self.assertEqual(len(gone), 16001)
        for at in range(0, len(gone), 4096):
            client.send('DELETE', names_body(gone[at:at + 4096]))
        wrong = self.host.build(tid, kind=DELETE_KIND, deletes=gone[1:])
        with self.assertRaises(Error) as caught:
            client.call('COMMIT', wrong)
        self.assertEqual(caught.exception.code, 'MISMATCH')
        self.host.commit(client, tid, kind=DELETE_KIND, deletes=gone)
        n, _, _, blocks, size, _ = struct.unpack(
            '>Q32sQQQI', client.call('STAT')[1])
        self.assertEqual((n, blocks, size), (2, 0, 0))

    def test_many_that_never_read(self):
        """60 clients ask for 10 MB each and take none of it: they hold
        little, and are let go; who reads is served.
        """
        client = self.authed()
        tid = os.urandom(16)
        self.host.begin(client, tid)
        names = [put(client, block('c', 'n%d' % number, 250000))
                 for number in range(40)]
        self.host.commit(client, tid, puts=names)
        deaf = [self.authed() for _ in range(60)]
        for other in deaf:
            other.send('GET', b'\3' + names_body(names))
        self.assertEqual(client.call('STAT')[0], 'STATUS')
        self.assertEqual([len(one) for one in get(client, names)],
                         [250040] * 40)
        self.assertLess(self.memory('VmHWM'), 150 * MIB)

    def test_what_a_large_commit_put_is_told_to_few_at_once(self):
        """However many ask for it; it takes memory while it is told."""
        client = self.authed()
        tid = os.urandom(16)
        self.host.begin(client, tid)
        names = self.put_many(client, 110000)
        self.host.commit(client, tid, puts=names)
        ask = bytes(40) + b'\1'
        deaf = [self.authed() for _ in range(16)]
        for other in deaf:
            other.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF,
                                       4096)
            other.send('CHANGES', ask)
        self.assertEqual(client.call('STAT')[0], 'STATUS')
        time.sleep(5)
        self.assertLess(self.memory('VmHWM'), 170 * MIB)
        # Who reads has its turn.
        for other in deaf:
            other.close()
        told = 0
        client.send('CHANGES', ask)
        while True:
            kind, body = client.next()
            told += len(body) // 37 * (kind == 'ADDED')
            if kind == 'OK':
                break
        self.assertEqual(told, 110000)

    def test_errors_nobody_reads(self):
        """A PUT without transaction has an answer, of which not too many
        wait for somebody to read them.
        """
        client = self.authed()
        before = self.memory()
        client.link.sock.settimeout(1)
        data = b''.join(frame(13, b'\0\0') for _ in range(20000))
        with self.assertRaises(Closed):
            for _ in range(400):
                client.link.send(data)
        self.assertLess(self.memory(), before + 24 * MIB)


class Strangers(unittest.TestCase):

    def test_machines_that_are_not_there(self):
        """Each name costs requests to the store, which may cost money."""
        serve = Serve(server_directory(self))
        self.addCleanup(serve.kill)
        client = serve.client()
        host, codes = Host(client, user='joe', password=b'pw'), []
        client.close()
        while len(codes) < 260 and 'BUSY' not in codes:
            client = serve.client()
            for number in range(60):
                # Sometimes it is there, and the key is another.
                machine = host.machine if number % 9 == 0 else number
                try:
                    client.auth(machine, rawclient.Keys(), R)
                except Error as e:
                    codes.append(e.code)
                except Closed:
                    break
            client.close()
        self.assertEqual(codes.index('BUSY'), 200, codes[-9:])
        # It is over at once, and ends by itself.
        strange = tarsnapd.Strange()
        for _ in range(230):
            strange.wrong('192.0.2.7', 1000)
        waits = [strange.wait(address, now) for address, now in (
            ('192.0.2.7', 1000), ('192.0.2.8', 1000), ('192.0.2.7', 1015),
            ('192.0.2.7', 1000 + 320), ('192.0.2.7', 5))]
        self.assertEqual(waits, [10, 0, 10, 0, 10])
        for i in range(strange.ROWS + 5):
            strange.wrong('10.%d.%d.1' % divmod(i, 256), 1000)
        self.assertEqual(len(strange.until), strange.ROWS)


class Keys(unittest.TestCase):
    """TLS has records that hold nothing for us, such as a new key: an endless
    stream of these must not keep the loop from everybody else.
    """

    def setUp(self):
        self.path = server_directory(self)
        self.serve = Serve(self.path)
        self.addCleanup(self.serve.kill)
        # Python cannot ask for a new key, its library can.
        library = self.library = ctypes.CDLL(_ssl.__file__)
        try:
            for name in ('TLS_client_method', 'SSL_CTX_new', 'SSL_new'):
                getattr(library, name).restype = ctypes.c_void_p
            context = ctypes.c_void_p(library.SSL_CTX_new(ctypes.c_void_p(
                library.TLS_client_method())))
            library.SSL_key_update.argtypes = ctypes.c_void_p, ctypes.c_int
        except AttributeError as e:
            self.skipTest('no library of TLS: %s' % e)
        self.sock = socket.create_connection(('127.0.0.1', self.serve.port))
        self.addCleanup(self.sock.close)
        self.tls = ctypes.c_void_p(library.SSL_new(context))
        library.SSL_set_fd(self.tls, self.sock.fileno())
        self.assertEqual(library.SSL_connect(self.tls), 1)

    def test_without_end(self):
        library, count = self.library, 0
        while library.SSL_key_update(self.tls, 0) == 1 == (
                library.SSL_do_handshake(self.tls)):
            count += 1
            self.assertLess(count, 50000)
        self.serve.client().close()

    def test_few_bytes_in_each_record(self):
        """What a stranger may send is bounded, also if little of it is said:
        60 requests of 4 kB, which are a megabyte and a half of records.
        """
        client = self.serve.client()
        self.addCleanup(client.close)
        data, answers = frame(8, bytes(4096)) * 60, 0
        try:
            for at in range(0, len(data), 4):
                client.link.sock.sendall(data[at:at + 4])
        except OSError:
            pass
        with self.assertRaises(Closed):
            while True:
                answers += client.link.next()[0] == 130
        self.assertLess(answers, 60)


class Buffers(unittest.TestCase):
    """A buffer of TLS keeps the most that was ever in it, for as long as a
    connection lasts: it is given little at a time.
    """

    SIZE = 1 << 20

    def most(self, client, serve):
        """The most put into a buffer and taken out, while both ends do."""
        put, taken = [], []

        class Seen:
            """A MemoryBIO, watched; it has no subclasses."""

            def __init__(self, real):
                self.real = real

            pending = property(lambda self: self.real.pending)

            def write(self, data):
                put.append(len(data))
                return self.real.write(data)

            def read(self):
                taken.append(self.real.pending)
                return self.real.read()

        with socket.socket() as listening:
            listening.bind(('127.0.0.1', 0))
            listening.listen()
            thread = threading.Thread(target=client, args=(
                listening.getsockname(),))
            thread.start()
            self.addCleanup(thread.join)
            sock, _ = listening.accept()
        sock.setblocking(False)
        context = tarsnapd.tls_context(server_directory(self))
        secure = tarsnapd.Secure(sock, context)
        secure.incoming = Seen(secure.incoming)
        secure.outgoing = Seen(secure.outgoing)
        try:
            self.again(secure, secure.do_handshake)
            serve(secure)
        finally:
            secure.close()
        return max(put), max(taken)

    def again(self, secure, call, *args):
        """What `call` returns once it need not wait."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                return call(*args)
            except (BlockingIOError, ssl.SSLWantReadError,
                    ssl.SSLWantWriteError):
                select.select([secure], [secure] if secure.unsent else [],
                              [], 0.01)
        raise AssertionError('it waits for ever')

    def connect(self, address):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(socket.create_connection(address, 60))

    def test_what_is_sent(self):
        data, got = os.urandom(self.SIZE), []

        def client(address):
            with self.connect(address) as sock:
                while sum(map(len, got)) < len(data):
                    got.append(sock.recv(self.SIZE))

        def serve(secure):
            left = memoryview(data)
            while left:
                left = left[self.again(secure, secure.send, left):]
            select.select([secure], [], [], 60)     # the client has it all

        _, taken = self.most(client, serve)
        self.assertEqual(b''.join(got), data)
        self.assertLess(taken, 2 * tarsnapd.LIMIT['records'] + 1024)

    def test_what_comes(self):
        data, got = os.urandom(self.SIZE), bytearray()

        def client(address):
            with self.connect(address) as sock:
                sock.sendall(data)
                sock.recv(1)

        def serve(secure):
            room = memoryview(bytearray(self.SIZE))
            while len(got) < len(data):
                count = self.again(secure, secure.recv_into, room)
                got.extend(room[:count])
                time.sleep(0.001)       # that more is there the next time

        put, _ = self.most(client, serve)
        self.assertEqual(bytes(got), data)
        self.assertLessEqual(put, tarsnapd.LIMIT['records'])


class Names(unittest.TestCase):
    """Listed is a map from names to numbers, in order."""

    def setUp(self):
        self.path = server_directory(self)
        self.listed = tarsnapd.Listed(os.path.join(self.path, 'tmp', 'x'))
        self.addCleanup(self.listed.close)

    def test_numbers_are_the_last_or_the_first(self):
        listed = self.listed
        self.assertEqual((len(listed), list(listed.parts())), (0, []))
        self.assertEqual(listed.add([(b'b', 1), (b'a', 2), (b'b', 3)]), 2)
        self.assertEqual([listed.get(x) for x in (b'a', b'b', b'c')],
                         [2, 3, None])
        self.assertEqual(listed.add([(b'a', 9), (b'c', 9)], True), 1)
        self.assertEqual([listed.get(x) for x in (b'a', b'c')], [2, 9])
        self.assertEqual(list(listed.parts()), [[b'a', b'b', b'c']])
        self.assertEqual(os.listdir(os.path.join(self.path, 'tmp')), [])
        listed.close()
        self.assertEqual((len(listed), b'a' in listed), (0, False))

    def test_a_delete_is_held_against_what_is_live_now(self):
        """Fewer blocks than names: CONFLICT if others committed since."""
        client = Client(Embedded(self.path, create=True))
        self.addCleanup(client.close)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W, D)
        _, _, names = host.backup(client, 'one', blocks=5)
        stale = host.copy()
        tid = os.urandom(16)
        host.begin(client, tid, kind=DELETE_KIND)
        client.send('DELETE', names_body(names))
        host.commit(client, tid, kind=DELETE_KIND, deletes=names)
        stale.begin(client, os.urandom(16), kind=DELETE_KIND)
        client.send('DELETE', names_body(names))
        with self.assertRaises(Error) as caught:
            client.next()
        self.assertEqual(caught.exception.code, 'CONFLICT')


if __name__ == '__main__':
    unittest.main()
