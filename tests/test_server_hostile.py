# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Nothing a stranger or a key holder sends stops the server."""

import os
import random
import resource
import socket
import ssl
import struct
import threading
import time
import unittest

from rawclient import (
    COMPLETE, D, DELETE_KIND, N, R, REQUEST, W, ZERO, Client, Closed, Embedded,
    Error, Host, Serve, Wire, block, get, names_body, part, put,
    server_directory, tarsnapd, u16, u64)


def frame(kind, body=b'', rid=1, length=None):
    return struct.pack('>IBI', len(body) if length is None else length,
                       kind, rid) + body


class Hostile(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.serve = Serve(self.path)
        self.addCleanup(self.serve.kill)
        client = self.connect()
        self.host = Host(client, user='joe', password=b'pw')
        client.close()

    def tearDown(self):
        """Whatever a test did, the server still serves."""
        self.assertTrue(self.serve.alive())
        client = self.connect()
        client.auth(self.host.machine, self.host.keys, R, W)
        self.host.begin(client, os.urandom(16))

    def connect(self):
        for _ in range(50):
            try:
                client = self.serve.client()
                self.addCleanup(client.close)
                return client
            except Closed:
                time.sleep(0.1)     # others are being let go
        return self.fail('no connection in five seconds')

    def authed(self):
        client = self.connect()
        client.auth(self.host.machine, self.host.keys, R, W, D, N)
        return client

    def check_refused_and_closed(self, client, data):
        """The bytes are answered BAD and then the connection ends."""
        client.link.send(data)
        with self.assertRaises(Error) as caught:
            client.next()
        self.assertEqual(caught.exception.code, 'BAD')
        with self.assertRaises(Closed):
            client.next()

    def memory(self, what='VmRSS'):
        with open('/proc/%d/status' % self.serve.child.pid) as file:
            for line in file:
                if line.startswith(what):
                    return int(line.split()[1]) << 10
        return 0

    def test_bytes_that_are_no_tls(self):
        for data in (b'GET / HTTP/1.0\r\n\r\n', bytes(1000),
                     os.urandom(5000)):
            with socket.create_connection(('127.0.0.1', self.serve.port),
                                          10) as sock:
                sock.sendall(data)
                try:
                    while sock.recv(4096):
                        pass
                except ConnectionError:
                    pass
            self.assertTrue(self.serve.alive())

    def test_old_tls_is_not_spoken(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(('127.0.0.1', self.serve.port),
                                      10) as sock:
            with self.assertRaises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(sock)

    def test_no_session_tickets(self):
        client = self.connect()
        client.call('HELLO', u16(1))
        session = client.link.sock.session
        self.assertFalse(session is not None and session.has_ticket)

    def test_lengths_over_the_ceiling_are_refused_by_the_header(self):
        before = self.memory()
        for length in (4097, 1 << 20, (1 << 32) - 1):
            self.check_refused_and_closed(self.connect(),
                                    frame(1, b'', length=length))
        for length in ((1 << 20) + 4097, (1 << 32) - 1):
            self.check_refused_and_closed(self.authed(),
                                    frame(11, b'', length=length))
        self.assertLess(self.memory(), before + (16 << 20))

    def test_unknown_requests(self):
        for kind in (0, max(tarsnapd.REQUESTS) + 1, 127, 128, 133, 255):
            self.check_refused_and_closed(self.connect(), frame(kind))
            self.check_refused_and_closed(self.authed(), frame(kind))

    def test_requests_before_auth(self):
        client = self.connect()
        for kind in range(5, max(tarsnapd.REQUESTS) + 1):
            client.link.send(frame(kind, bytes(100), kind))
            with self.assertRaises(Error) as caught:
                client.next()
            self.assertEqual(caught.exception.code, 'ROLE')

    def test_blocks_out_of_shape(self):
        name, cls, good = block('i', 'x', 200)
        bad = [b'', good[:34], good[:-1], good + b'\0',
               b'\2' + good[1:], good[:1] + b'c' + good[2:],
               good[:2] + b'\1' + good[3:], good[:2] + b'\3' + good[3:],
               good[:35] + b'\1' + good[36:],
               good[:36] + struct.pack('>I', 27) + good[40:],
               good[:36] + b'\xff\xff\xff\xff' + good[40:]]
        bad = [cls + sealed for sealed in bad]
        bad += [b'c' + b'\1c\1' + ZERO + part(1, bytes(27)),
                b'c' + b'\1c\1' + ZERO + part(2, bytes(28)), b'd' + good]
        for sealed in bad:
            client = self.authed()
            self.host.begin(client, os.urandom(16))
            self.check_refused_and_closed(client, frame(11, name + sealed))
        client = self.authed()
        self.host.begin(client, os.urandom(16))
        large = block('c', 'x', 288 * 1024)
        self.check_refused_and_closed(client, frame(11, b''.join(large)))

    def test_a_commit_that_nobody_could_be_told_of(self):
        """CHANGES and LIST put eight bytes in front of it."""
        most = (1 << 20) + 4096
        for size in (most, most - 7, most - 8):
            client, tid = self.authed(), os.urandom(16)
            self.host.begin(client, tid)
            record = put(client, block('a', '%d' % size))

            def build(count, note=b''):
                return self.host.build(
                    tid, puts=[record], note=note, linked=[
                        (u64(i) * 4, record, bytes(16), COMPLETE)
                        for i in range(count)])

            short = len(build(0))
            commit = build((size - short) // 81,
                           bytes((size - short) % 81))
            self.assertEqual(len(commit), size)
            if size > most - 8:
                with self.assertRaises(Error) as caught:
                    client.call('COMMIT', commit)
                self.assertEqual(caught.exception.code, 'BAD')
        self.assertEqual(client.call('COMMIT', commit)[0], 'COMMITTED')
        self.host.remember(commit)
        self.assertEqual(client.stream('CHANGES', bytes(41))[0][1][8:],
                         commit)

    def test_names_to_revive_twice(self):
        """CHANGES would tell of both, and every client refuse the history as
        that of a server that lies.
        """
        client = self.authed()
        tid = os.urandom(16)
        self.host.begin(client, tid)
        names = [put(client, block('c', '%d' % i, 100)) for i in range(2)]
        self.host.commit(client, tid, puts=names)
        tid = os.urandom(16)
        self.host.begin(client, tid, kind=DELETE_KIND)
        client.send('DELETE', names_body(sorted(names)))
        self.host.commit(client, tid, kind=DELETE_KIND,
                         deletes=sorted(names))
        self.host.begin(client, os.urandom(16), kind=DELETE_KIND)
        with self.assertRaises(Error) as caught:
            client.stream('REVIVE', names_body(names + names[:1]))
        self.assertEqual(caught.exception.code, 'NOBLOCK')
        # None was taken: they may be named again, once.
        self.assertEqual([kind for kind, _ in client.stream(
            'REVIVE', names_body(names))], ['ADDED'])
        with self.assertRaises(Error):
            client.stream('REVIVE', names_body(names[:1]))

    def test_too_many_names(self):
        for kind in (7, 9):
            self.check_refused_and_closed(
                self.authed(), frame(kind, names_body([ZERO] * 4097)))

    def test_slow_strangers_are_let_go(self):
        silent = [socket.create_connection(('127.0.0.1', self.serve.port))
                  for _ in range(3)]
        talking = self.connect()
        start = time.time()
        with self.assertRaises(Closed):
            while time.time() < start + 15:
                talking.call('HELLO', u16(1))
                time.sleep(0.3)
        self.assertGreater(time.time() - start, 8)
        for sock in silent:
            sock.settimeout(5)
            self.assertEqual(sock.recv(1), b'')
            sock.close()

    def test_strangers_are_few_and_friends_are_not(self):
        friends = [self.authed() for _ in range(12)]
        strangers = [socket.create_connection(('127.0.0.1',
                                               self.serve.port))
                     for _ in range(12)]
        closed = 0
        for sock in strangers:
            sock.settimeout(0.3)
            try:
                closed += sock.recv(1) == b''
            except socket.timeout:
                pass
            except ConnectionError:
                closed += 1
        self.assertEqual(closed, 4)
        for client in friends:
            self.assertEqual(client.call('HELLO', u16(1))[0], 'OK')
        for sock in strangers:
            sock.close()

    def test_passwords_cannot_be_tried_at_leisure(self):
        client = self.connect()
        for _ in range(3):
            with self.assertRaises(Error) as caught:
                client.register(self.host.keys, 'joe', b'wrong')
            self.assertEqual(caught.exception.code, 'LOGIN')
        with self.assertRaises(Closed):
            client.register(self.host.keys, 'joe', b'pw')

    def test_unknown_users_look_like_known_ones(self):
        challenges = []
        for user in ('joe', 'nobody', 'nobody'):
            client = self.connect()
            body = ZERO + bytes([len(user)]) + user.encode()
            challenges.append(client.call('REGISTER1', body)[1])
            with self.assertRaises(Error) as caught:
                client.register(self.host.keys, user, b'wrong')
            self.assertEqual(caught.exception.code, 'LOGIN')
        self.assertEqual(challenges[1], challenges[2])
        self.assertEqual([c[32:] for c in challenges],
                         [challenges[0][32:]] * 3)

    def test_a_proof_is_for_these_keys_only(self):
        client = self.connect()
        with self.assertRaises(Error) as caught:
            client.register(self.host.keys, 'joe', b'pw', spoil=True)
        self.assertEqual(caught.exception.code, 'LOGIN')
        for body in (b'\0' + self.host.keys.public + ZERO,):
            with self.assertRaises(Error) as caught:
                client.call('REGISTER2', body)
            self.assertEqual(caught.exception.code, 'LOGIN')

    def test_a_client_that_does_not_read(self):
        client = self.authed()
        tid = os.urandom(16)
        self.host.begin(client, tid)
        names = [put(client, block('c', 'n%d' % i, 250000))
                 for i in range(40)]
        self.host.commit(client, tid, puts=names)
        before = self.memory()
        deaf = [self.authed() for _ in range(5)]
        for other in deaf:
            for _ in range(200):
                other.send('GET', b'\3' + names_body(names))
        time.sleep(1)
        self.assertLess(self.memory(), before + (80 << 20))
        start = time.time()
        self.assertEqual(client.call('STAT')[0], 'STATUS')
        self.assertLess(time.time() - start, 5)

    def test_requests_of_a_client_that_does_not_read_are_not_hoarded(self):
        client = self.authed()
        tid = os.urandom(16)
        self.host.begin(client, tid)
        names = [put(client, block('c', 'n%d' % i, 250000))
                 for i in range(40)]
        self.host.commit(client, tid, puts=names)
        before = self.memory()
        client.send('GET', b'\3' + names_body(names))
        client.link.sock.settimeout(1)
        with self.assertRaises(Closed):
            for _ in range(500):
                client.send('HAS', names_body([ZERO] * 4096))
        self.assertLess(self.memory(), before + (24 << 20))

    def test_partial_frames_of_many_do_not_fill_memory(self):
        clients = [self.authed() for _ in range(8)]
        before = self.memory()
        for client in clients:
            client.link.send(frame(11, bytes(1 << 19), length=1 << 20))
        time.sleep(0.5)
        self.assertLess(self.memory(), before + (32 << 20))

    def test_a_frame_longer_than_what_is_read_ahead(self):
        client, tid = self.authed(), os.urandom(16)
        self.host.begin(client, tid)
        name, cls, body = block('i', 'long', 520000)
        self.assertGreater(len(body), 1 << 20 - 1)
        put(client, (name, cls, body))
        record = put(client, block('a', 'long'))
        self.host.commit(client, tid, puts=[name, record], linked=[
            (ZERO, record, bytes(16), COMPLETE)])
        self.assertEqual(get(client, [name]), [body])

    def test_puts_that_come_faster_than_they_are_written(self):
        clients, threads, before = [], [], self.memory('VmHWM')
        body = b'c' + block('c', 'fast', 250000)[2]
        for _ in range(4):
            client, tid = self.authed(), os.urandom(16)
            self.host.begin(client, tid)
            clients.append(client)
            threads.append(threading.Thread(target=lambda client=client: [
                client.send('PUT', os.urandom(32) + body)
                for _ in range(120)]))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            client.call('ABORT')
        self.assertLess(self.memory('VmHWM'), before + (19 << 20))


class Fuzz(unittest.TestCase):
    """Seeded noise in every request, before and after AUTH."""

    ROUNDS = 400

    def setUp(self):
        self.path = server_directory(self)
        self.seed = random.randrange(1 << 32)
        print('test_server_hostile: seed %d' % self.seed)
        self.rng = random.Random(self.seed)
        first = Client(Embedded(self.path))
        self.host = Host(first)
        first.auth(self.host.machine, self.host.keys, R, W, D, N)
        self.archive, self.record, self.names = self.host.backup(first, 'x')
        self.state = first.call('STAT')
        first.close()

    def good_body(self, name):
        """A well-formed body, to be spoilt."""
        tid = self.rng.randbytes(16) if hasattr(
            self.rng, 'randbytes') else os.urandom(16)
        ids = names_body([self.archive, self.record])
        return {
            'HELLO': u16(1), 'REGISTER1': ZERO + b'\3joe',
            'REGISTER2': b'\4host' + self.host.keys.public + ZERO,
            'AUTH': bytes(107), 'CHANGES': u64(0) + ZERO + b'\1',
            'LIST': ids, 'GET': b'\3' + ids, 'HAS': ids,
            'BEGIN': b'\1' + tid + tid + u64(1) + self.host.head + b'\0',
            'PUT': b''.join(block('i', 'f')), 'WITHDRAW': ids,
            'DELETE': ids,
            'CHECKPOINT': self.host.build(tid),
            'COMMIT': self.host.build(tid),
            'NUKE': self.host.build(tid, kind=3, sign=W),
        }.get(name, b'')

    def spoil(self, body):
        rng, body = self.rng, bytearray(body)
        how = rng.randrange(5)
        if how == 0 and body:
            for _ in range(rng.randrange(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        elif how == 1:
            del body[rng.randrange(len(body) + 1):]
        elif how == 2:
            body += bytes(rng.randrange(1, 50))
        elif how == 3:
            body = bytearray(os.urandom(rng.randrange(300)))
        elif len(body) > 2:
            at = rng.randrange(len(body) - 2)
            body[at:at + 2] = b'\xff\xff'
        return bytes(body)

    def round(self, roles):
        client = Client(Embedded(self.path))
        client.auth(self.host.machine, self.host.keys, *roles) if (
            roles) else None
        local = client.link.local
        try:
            if W in roles and self.rng.random() < 0.7:
                self.host.begin(client, os.urandom(16))
            for _ in range(4):
                name = self.rng.choice(sorted(REQUEST))
                body = self.spoil(self.good_body(name))
                for kind, rid, _ in local.receive(REQUEST[name], 7, body):
                    self.assertGreaterEqual(kind, 129)
                    self.assertIn(rid, (0, 7))
                if local.over:
                    break
        finally:
            local.close()

    def test_noise(self):
        for i in range(self.ROUNDS):
            self.round([(), (R, W, D), (W,), (R, W, D, N)][i % 4])
        after = Client(Embedded(self.path))
        self.addCleanup(after.close)
        after.auth(self.host.machine, self.host.keys, R)
        status = after.call('STAT')
        self.assertEqual(status, self.state)

    def test_noise_on_the_wire(self):
        serve = Serve(self.path)
        self.addCleanup(serve.kill)
        for i in range(60):
            try:
                client = Client(Wire(serve.port))
                if i % 2:
                    client.auth(self.host.machine, self.host.keys, R, W, D)
                for _ in range(5):
                    name = self.rng.choice(sorted(REQUEST))
                    body = self.spoil(self.good_body(name))
                    client.link.send(frame(REQUEST[name], body))
                client.link.send(os.urandom(self.rng.randrange(100)))
                client.close()
            except Closed:
                pass
            self.assertTrue(serve.alive())
        client = serve.client()
        client.auth(self.host.machine, self.host.keys, R)
        self.assertEqual(client.call('STAT'), self.state)
        client.close()
        self.assertEqual(serve.stop(), (0, ''))

    def test_frames_cut_anywhere(self):
        frames = tarsnapd.Frames()
        frames.ceiling = 100
        stream = b''.join(frame(5, os.urandom(i), i) for i in range(100))
        found, pos = [], 0
        while pos < len(stream):
            step = self.rng.randrange(1, 40)
            frames.buf += stream[pos:pos + step]
            pos += step
            while True:
                one = frames.next()
                if one is None:
                    break
                found.append(one[1])
        self.assertEqual(found, list(range(100)))
        self.assertEqual(bytes(frames.buf), b'')


class Thousand(unittest.TestCase):

    def test_many_idle_connections(self):
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft < 600:
            self.skipTest('only %d descriptors' % soft)
        path = server_directory(self)
        serve = Serve(path)
        self.addCleanup(serve.kill)
        client = serve.client()
        host = Host(client, user='joe', password=b'pw')
        clients = [client]
        client.auth(host.machine, host.keys, R)
        for _ in range(200):
            client = serve.client()
            client.auth(host.machine, host.keys, R)
            clients.append(client)
        for client in clients:
            client.send('STAT')
        for client in clients:
            self.assertEqual(client.next()[0], 'STATUS')
            client.close()


if __name__ == '__main__':
    unittest.main()
