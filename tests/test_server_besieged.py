# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A real client backs up, and restores, while others do their worst to the
real server beside it; whose memory stays below a ceiling.
"""

import os
import select
import socket
import ssl
import struct
import threading
import time
import unittest

from world import World, tree_equal, tree_small

MEMORY = 150 << 20
HELLO = struct.pack('>IBI', 2, 1, 1) + b'\0\1'


class Siege:
    """Sockets of hostile clients, driven by one thread each kind."""

    def __init__(self, case, port):
        self.port = port
        self.over = False
        self.socks = []
        self.done = {}              # kind -> times something was done
        case.addCleanup(self.end)
        self.threads = []

    def begin(self, *kinds):
        for kind in kinds:
            self.done[kind.__name__] = 0
            thread = threading.Thread(target=self.run, args=(kind,),
                                      daemon=True)
            self.threads.append(thread)
            thread.start()

    def run(self, kind):
        while not self.over:
            try:
                kind()
                self.done[kind.__name__] += 1
            except (OSError, ValueError):
                time.sleep(0.01)

    def end(self):
        self.over = True
        for thread in self.threads:
            thread.join(10)
        for sock in self.socks:
            sock.close()

    def raw(self, host='127.0.0.1'):
        """A connected socket that comes from loopback address `host`."""
        sock = socket.create_connection(('127.0.0.1', self.port), 5,
                                        (host, 0))
        self.socks.append(sock)
        if len(self.socks) > 300:
            self.socks.pop(0).close()
        return sock

    def tls(self, host='127.0.0.1'):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        sock = context.wrap_socket(self.raw(host))
        self.socks[-1] = sock
        return sock

    # What they do.

    def half_open(self):
        """Connect, from one address, and say nothing."""
        self.raw()
        time.sleep(0.02)

    def from_many(self):
        """The same from a hundred addresses."""
        self.raw('127.0.1.%d' % (1 + self.done['from_many'] % 100))
        time.sleep(0.02)

    def slow_handshake(self):
        """A ClientHello, a byte at a time."""
        sock = self.raw('127.0.2.1')
        for byte in b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' * 20:
            sock.sendall(bytes([byte]))
            time.sleep(0.05)

    def slow_frame(self):
        """A request, a byte at a time."""
        sock = self.tls('127.0.2.2')
        for byte in HELLO * 20:
            sock.sendall(bytes([byte]))
            time.sleep(0.05)

    def flood_hello(self):
        """As many requests as go."""
        sock = self.tls('127.0.2.3')
        sock.sendall(HELLO * 3000)
        time.sleep(0.02)

    def rubbish(self):
        """Bytes that are no frames."""
        sock = self.tls('127.0.2.4')
        sock.sendall(os.urandom(4000))
        while select.select([sock], [], [], 1)[0] and sock.recv(4096):
            pass


class Besieged(unittest.TestCase):

    def setUp(self):
        self.world = World(self, 'tls')
        self.world.keygen()
        self.tree = self.world.path('tree')
        tree_small(self.tree, 5)

    def memory(self):
        with open('/proc/%d/status'
                  % self.world.server.running.process.pid) as file:
            for line in file:
                if line.startswith('VmHWM:'):
                    return int(line.split()[1]) << 10
        return 0

    def test_a_backup_in_the_midst_of_floods(self):
        siege = Siege(self, self.world.server.port)
        siege.begin(siege.half_open, siege.from_many, siege.slow_handshake,
                    siege.slow_frame, siege.flood_hello, siege.rubbish)
        time.sleep(1)
        for name in ('one', 'two'):
            self.world.ok('-c', '-f', name, '-C', self.tree, '.')
        tree_equal(self, self.tree, self.world.extract('two'))
        siege.end()
        for name, count in siege.done.items():
            if not name.startswith('slow'):
                self.assertGreater(count, 10, name)
        self.assertLess(self.memory(), MEMORY)
        self.assertNotIn(b'Traceback', self.world.server.running.text())

    def test_strangers_that_stay(self):
        """64 of them, from as many addresses, keep nobody out."""
        siege = Siege(self, self.world.server.port)
        for number in range(64):
            siege.raw('127.0.3.%d' % (number + 1))
        time.sleep(0.5)
        open_before = [sock for sock in siege.socks if not closed(sock)]
        self.assertEqual(len(open_before), 64)
        self.world.ok('--list-archives')
        gone = [number for number, sock in enumerate(siege.socks)
                if closed(sock)]
        # Whoever has been there longest makes room, one for each newcomer.
        self.assertIn(0, gone)
        self.assertLess(len(gone), 5)
        # And of one address eight.
        more = [siege.raw('127.0.4.1') for _ in range(12)]
        time.sleep(0.5)
        self.assertEqual([closed(sock) for sock in more],
                         [True] * 4 + [False] * 8)


def closed(sock):
    """True if the server has hung up."""
    sock.settimeout(0.01)
    try:
        return sock.recv(1) == b''
    except socket.timeout:
        return False
    except OSError:
        return True


if __name__ == '__main__':
    unittest.main()
