#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Times the main job over a slow link to our server.

A proxy stands between client and server.  It keeps all that passes back for
half of the round trip time, each way; lets at most so many bytes a second
through, if told so; and holds the stream up by one more round trip for a share
of the packets, as if they had been lost.  Like a Linux host's buffers it takes
4 MiB that have not arrived yet, each way.  It counts connections, bytes, and
round trips: the longest chain of things said by one side after it had heard
the one before from the other side (Lamport's clock).  What is merely in
flight at the same time is one.

Works: first, unchanged, list (-t), restore, lists (--list-archives, with few
and with many archives), stats (--print-stats of all), delete.  The files are
random bytes, so that what is restored is what passes the link.  It takes two
minutes.
"""

import collections
import os
import random
import shutil
import socket
import sys
import threading
import time

import common
import trees

sys.path.insert(0, os.path.join(common.HERE, 'tests'))

IN_FLIGHT = 4 << 20     # bytes each way; what Linux buffers by default
PIECE = 1 << 16         # bytes taken at once
PACKET = 1460           # bytes that are lost together

##############################################################################
# The proxy
##############################################################################


class Counts:
    """What passed since some moment, and the clocks of the two sides.

    What a side sends carries its clock; on arrival the other side's clock is
    one more than that, if it was not already later.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.clocks = [0, 0]        # client, server
        self.bytes = [0, 0]         # up, down
        self.connections = 0        # setting one up is a round trip

    def sent(self, side, size):
        """A side sent so much; the stamp that goes with it."""
        with self.lock:
            self.bytes[side] += size
            return self.clocks[side]

    def arrived(self, side, stamp):
        """Something came to a side."""
        with self.lock:
            self.clocks[side] = max(self.clocks[side], stamp + 1)

    def figures(self):
        return {'round_trips': self.clocks[0] // 2 + self.connections,
                'connections': self.connections,
                'bytes_up': self.bytes[0], 'bytes_down': self.bytes[1]}


class Way:
    """One direction of one connection: a thread that takes, one that gives."""

    def __init__(self, proxy, counts, source, target, side):
        self.proxy = proxy
        self.counts = counts
        self.source = source
        self.target = target
        self.side = side            # 0: from the client
        self.changed = threading.Condition()
        self.line = collections.deque()     # (due, clock, data)
        self.held = 0               # bytes in the line
        self.free = 0.0             # when the line has passed what it took
        self.rng = random.Random(side)
        self.threads = [threading.Thread(target=work, daemon=True)
                        for work in (self.take, self.give)]
        for thread in self.threads:
            thread.start()

    def due(self, size):
        """When so many bytes, taken now, are through."""
        now = max(time.monotonic(), self.free)
        if self.proxy.rate:
            now += size / self.proxy.rate
        packets = -(-size // PACKET)
        if self.rng.random() < 1 - (1 - self.proxy.loss) ** packets:
            now += self.proxy.rtt
        self.free = now
        return now + self.proxy.rtt / 2

    def take(self):
        data = True
        while data:
            try:
                data = self.source.recv(PIECE)
            except OSError:
                data = b''
            stamp = self.counts.sent(self.side, len(data))
            with self.changed:
                while self.held > IN_FLIGHT:
                    self.changed.wait()
                self.line.append((self.due(len(data)), stamp, data))
                self.held += len(data)
                self.changed.notify_all()

    def give(self):
        data = True
        while data:
            with self.changed:
                while not self.line:
                    self.changed.wait()
                due, stamp, data = self.line.popleft()
            time.sleep(max(0, due - time.monotonic()))
            self.counts.arrived(1 - self.side, stamp)
            try:
                if data:
                    self.target.sendall(data)
                else:
                    self.target.shutdown(socket.SHUT_WR)
            except OSError:
                pass                # it has hung up; the rest is dropped
            with self.changed:
                self.held -= len(data)
                self.changed.notify_all()


class Proxy:
    """A slow link to `address` (host, port), at a port of its own."""

    def __init__(self, address, rtt, rate=0, loss=0.0):
        self.address = address
        self.rtt = rtt              # seconds
        self.rate = rate            # bytes a second each way; 0: no limit
        self.loss = loss            # share of packets
        self.counts = Counts()      # of the connections made from now on
        self.listener = socket.create_server(('127.0.0.1', 0), backlog=64)
        self.server = '127.0.0.1:%d' % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return              # closed
            threading.Thread(target=self.connect, args=(client,),
                             daemon=True).start()

    def connect(self, client):
        """Serve one connection to its end."""
        counts = self.counts
        counts.connections += 1
        time.sleep(self.rtt)
        with client, socket.create_connection(self.address) as server:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ways = [Way(self, counts, client, server, 0),
                    Way(self, counts, server, client, 1)]
            for way in ways:
                for thread in way.threads:
                    thread.join()

    def close(self):
        self.listener.close()


##############################################################################
# The works
##############################################################################


def many_make(store, key, count):
    """So many archives, in a process of its own (see trees.apart)."""
    import many
    many.Many(store, key).make(count)


class Bench:

    def __init__(self, place, report, args):
        self.place = place
        self.report = report
        self.args = args
        self.tree = place.path('tree')
        self.data = 0
        trees.apart(self.fill)
        self.files, self.data = common.warm(self.tree)
        self.child, address, pin = place.serve('server')
        host, _, port = address.rpartition(':')
        self.proxy = Proxy((host, int(port)), args.rtt / 1000,
                           args.rate, args.loss)
        place.key('key', address, pin)

    def fill(self):
        """The tree: half in large files, half in small ones."""
        rng = random.Random(1)
        half = self.args.size // 2
        for folder, count in (('large', 4),
                              ('small', max(1, half // 100000))):
            os.makedirs(os.path.join(self.tree, folder))
            for i in range(count):
                with open(os.path.join(self.tree, folder, str(i)),
                          'wb') as file:
                    file.write(rng.randbytes(half // count))

    def client(self, *words):
        """A command line over the slow link."""
        return self.place.client('key', 'cache', '--server',
                                 self.proxy.server, *words)

    def measure(self, work, *words, data=0, archives=1):
        """One work; `data` is how many bytes of files it moves."""
        self.proxy.counts = Counts()
        run = self.place.measure(self.client(*words), server=self.child.pid)
        run.update(self.proxy.counts.figures())
        if data:
            run['bytes_per_second'] = data / run['seconds']
        self.report.add(run, work=work, archives=archives)

    def rounds(self):
        """All but the lists of many archives; leaves an archive."""
        out = self.place.path('out')
        for number in range(self.args.runs):
            if number:
                self.place.quiet(self.client('-d', '-f', 'b', '-f', 'a'))
            self.measure('first', '-c', '-f', 'a', '-C', self.tree, '.',
                         data=self.data)
            self.measure('unchanged', '-c', '-f', 'b', '-C', self.tree, '.')
            self.measure('delete', '-d', '-f', 'b', archives=2)
            self.place.quiet(self.client('-c', '-f', 'b', '-C', self.tree,
                                         '.'))
            self.measure('list', '-t', '-f', 'a')
            shutil.rmtree(out, ignore_errors=True)
            os.mkdir(out)
            self.measure('restore', '-x', '-f', 'a', '-C', out,
                         data=self.data)
            found = sum(len(names) for _, _, names in os.walk(out))
            if found != self.files:
                sys.exit('%d of %d files were restored' % (found, self.files))
        self.place.quiet(self.client('-d', '-f', 'b'))

    def lists(self):
        """--list-archives with one archive and with many; then what else
        their number might slow down.
        """
        for archives in (1, self.args.archives):
            self.archives_make(archives - 1)
            for _ in range(self.args.runs):
                self.measure('lists', '--list-archives', archives=archives)
        self.place.quiet(self.place.client('key', 'cache', '--fsck'))
        for _ in range(self.args.runs):
            for work, *words in (
                    ('list', '-t', '-f', 'a'),
                    ('stats', '--print-stats', '-f', '*'),
                    ('unchanged', '-c', '-f', 'c', '-C', self.tree, '.'),
                    ('delete', '-d', '-f', 'c')):
                self.measure(work, *words, archives=archives)

    def archives_make(self, count):
        """So many archives of nothing, not over the slow link."""
        trees.apart(many_make, self.place.path('server'),
                    self.place.path('key'), count)

    def show(self):
        rows = [('work', 'archives', 'seconds (least-most)', 'MB/s',
                 'round trips', 'connections', 'MB up', 'MB down', 'CPU s',
                 'peak MB')]
        for figure in self.report.figures:
            rate = figure.get('bytes_per_second')
            rows.append((
                figure['work'], str(figure['archives']),
                common.spread(figure['seconds']),
                '%.1f' % (rate['median'] / 1e6) if rate else '',
                '%d' % figure['round_trips']['median'],
                '%d' % figure['connections']['median'],
                '%.2f' % (figure['bytes_up']['median'] / 1e6),
                '%.2f' % (figure['bytes_down']['median'] / 1e6),
                '%.2f' % figure['cpu']['median'],
                common.megabytes(figure['peak'])))
        common.table(rows)


def options():
    parser = common.parser(__doc__, 3)
    for name, kind, usual, unit, text in (
            ('rtt', float, 50, 'MS', 'round trip time'),
            ('rate', int, 0, 'BYTES', 'bytes a second each way, 0: no limit'),
            ('loss', float, 0, 'SHARE', 'share of packets that are lost'),
            ('size', int, 200000000, 'BYTES', 'bytes of the tree'),
            ('archives', int, 1000, 'N', 'archives that are listed')):
        parser.add_argument('--' + name, type=kind, default=usual,
                            metavar=unit, help='%s (%s)' % (text, usual))
    return common.parse(parser, rtt=4, size=40000, archives=3, loss=0.01,
                        rate=50000000)


def main():
    args = options()
    report = common.Report('network', args)
    with common.Place(args.dir) as place:
        bench = Bench(place, report, args)
        try:
            print('\n%d files, %d bytes, round trip %g ms, rate %s, loss %g'
                  % (bench.files, bench.data, args.rtt,
                     args.rate or 'unlimited', args.loss))
            bench.rounds()
            bench.lists()
        finally:
            bench.proxy.close()
        bench.show()
    report.write()


if __name__ == '__main__':
    main()
