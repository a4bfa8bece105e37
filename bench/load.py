#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Loads one server with many sessions: idle ones, and ones that are busy.

The sessions are those of tests/rawclient.py: TLS, proofs of keys, signed
commits, all as the protocol wants them, by machines registered with a
password.  The blocks have the shape of sealed ones and random names; sealing
is the client's work and not measured here.  Busy sessions run in threads of
one process for each processor, on the same machine as the server, so that
about half of the processors is what the server has.

Phases, each so many seconds long: `put`, every busy session sends an archive
of blocks, commits, and begins again; `get`, every one asks for one of its
blocks at a time; `both`, half does the one and half the other.  Latency is
that of a COMMIT until it is durable, and of a GET until the block is there.
MB a second of the server's own processor time say what it would do if the
clients ran elsewhere.
Idle sessions must still answer at the end.  All of it for each number of
workers: some two minutes.
"""

import multiprocessing
import os
import queue
import random
import statistics
import sys
import threading
import time

import common

sys.path.insert(0, os.path.join(common.HERE, 'tests'))

PHASES = ('put', 'get', 'both')
FORK = multiprocessing.get_context('fork')

##############################################################################
# In the processes of the clients
##############################################################################


class Busy:
    """One busy session and what it measured."""

    def __init__(self, raw, port, args):
        self.raw = raw
        self.args = args
        self.client = raw.Client(raw.Wire(port))
        self.host = raw.Host(self.client, user='bench', password=b'password')
        self.client.auth(self.host.machine, self.host.keys, raw.R, raw.W)
        self.body = b'c' + raw.block('c', 'load', args.block)[2]
        self.names = []             # of blocks that are committed
        self.took = {}              # phase, COMMIT or GET -> [seconds]
        self.moved = 0              # bytes, in this phase

    def put(self, phase):
        """One archive."""
        raw, tid = self.raw, os.urandom(16)
        self.host.begin(self.client, tid)
        names = [os.urandom(32) for _ in range(self.args.blocks)]
        for name in names:
            self.client.send('PUT', name + self.body)
        label = tid.hex()
        record = raw.put(self.client, raw.block('a', label))
        start = time.monotonic()
        self.host.commit(
            self.client, tid, puts=names + [record],
            linked=[(raw.sha(label.encode()), record, bytes(16),
                     raw.COMPLETE)])
        self.note(phase, 'COMMIT', start, len(names))
        self.names = (names + self.names)[:1000]

    def get(self, phase):
        """One block."""
        name = random.choice(self.names)
        start = time.monotonic()
        found, = self.raw.get(self.client, [name])
        assert found == self.body[1:], found
        self.note(phase, 'GET', start, 1)

    def note(self, phase, what, start, blocks):
        self.took.setdefault((phase, what), []).append(
            time.monotonic() - start)
        self.moved += blocks * len(self.body)

    def run(self, number, barrier, out):
        """All phases; every session begins each at the same time."""
        self.put('before')
        for phase in PHASES:
            work = self.get if phase == 'get' or (
                phase == 'both' and number % 2) else self.put
            self.moved = 0
            barrier.wait()
            start = time.monotonic()
            while time.monotonic() - start < self.args.seconds:
                work(phase)
            out.put((self.moved / (time.monotonic() - start),
                     self.took.get((phase, 'COMMIT'), []),
                     self.took.get((phase, 'GET'), []), self.moved))
            barrier.wait()
        self.client.close()


def busy_process(port, args, numbers, barrier, out):
    """Some of the busy sessions."""
    import rawclient
    ours = [Busy(rawclient, port, args) for _ in numbers]
    threads = [threading.Thread(target=one.run, args=(number, barrier, out))
               for number, one in zip(numbers, ours)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def idle_process(port, args, ready, over, out):
    """All idle sessions, of a few machines; how many answer at the end."""
    import rawclient as raw
    clients, host = [], None
    for number in range(args.idle):
        client = raw.Client(raw.Wire(port))
        if number % 50 == 0:
            host = raw.Host(client, user='bench', password=b'password')
        client.auth(host.machine, host.keys, raw.R)
        clients.append(client)
    ready.set()
    over.wait()
    out.put(sum(client.call('STAT')[0] == 'STATUS' for client in clients))


##############################################################################
# In the process that measures
##############################################################################


class Bench:
    """One server with so many workers, and its clients."""

    def __init__(self, place, report, args, workers):
        self.place = place
        self.report = report
        self.args = args
        self.workers = workers
        place.remove('server')
        self.child, address, _ = place.serve('server', '--workers',
                                             str(workers))
        self.port = int(address.rpartition(':')[2])
        self.out = FORK.Queue()
        self.processes = []

    def start(self, target, *args):
        process = FORK.Process(target=target, args=args, daemon=True)
        process.start()
        self.processes.append(process)

    def wait(self, poll):
        """What poll(seconds) finds, not False; ends the program if a client
        died.
        """
        while True:
            try:
                found = poll(1)
                if found is not False:
                    return found
            except queue.Empty:
                pass
            if any(process.exitcode for process in self.processes):
                sys.exit('a client failed')

    def run(self):
        args = self.args
        ready, over, idle = FORK.Event(), FORK.Event(), FORK.Queue()
        self.start(idle_process, self.port, args, ready, over, idle)
        self.wait(ready.wait)
        self.report.add({'server_peak': common.memory(self.child.pid)},
                        workers=self.workers, phase='idle')
        groups = min(os.cpu_count(), args.active)
        barrier = FORK.Barrier(args.active + 1)
        for group in range(groups):
            self.start(busy_process, self.port, args,
                       range(group, args.active, groups), barrier, self.out)
        for phase in PHASES:
            self.phase(phase, barrier)
        over.set()
        alive = self.wait(lambda seconds: idle.get(timeout=seconds))
        if alive != args.idle:
            sys.exit('%d of %d idle sessions answer' % (alive, args.idle))
        for process in self.processes:
            process.join()
        self.place.stop()

    def clients_cpu(self):
        """CPU seconds of all the processes of the clients so far."""
        return sum(common.processor(process.pid)
                   for process in self.processes)

    def phase(self, name, barrier):
        """One phase: the sum of all sessions."""
        barrier.wait(600)
        cpu, ours = common.processor(self.child.pid), self.clients_cpu()
        sampler = common.Sampler(self.child.pid)
        results = [self.wait(lambda seconds: self.out.get(timeout=seconds))
                   for _ in range(self.args.active)]
        run = {'bytes_per_second': sum(each[0] for each in results),
               'server_cpu': common.processor(self.child.pid) - cpu,
               'server_peak': sampler.end()[self.child.pid],
               'clients_cpu': self.clients_cpu() - ours}
        # What the server would do if it had processors to itself.
        run['bytes_per_server_cpu_second'] = sum(
            each[3] for each in results) / max(run['server_cpu'], .01)
        for what, column in (('commit', 1), ('get', 2)):
            took = [value for each in results for value in each[column]]
            run.update(percentiles(what, took))
        self.report.add(run, workers=self.workers, phase=name)
        barrier.wait(600)


def percentiles(what, took):
    """How many, and seconds that 50, 95 and 99 % did not exceed."""
    if len(took) < 2:
        return {}
    cuts = statistics.quantiles(took, n=100, method='inclusive')
    out = {'%s_p%d' % (what, share): cuts[share - 1]
           for share in (50, 95, 99)}
    return dict(out, **{what + '_count': len(took), what + '_most':
                        max(took)})


def show(report):
    rows = [('workers', 'phase', 'MB/s', 'a server CPU s',
             'server CPU s', 'clients CPU s', 'server MB')
            + tuple('%s %s ms' % (what, share) for what in ('COMMIT', 'GET')
                    for share in ('50 %', '95 %', '99 %', 'most'))]
    for figure in report.figures:
        def value(key, scale, form):
            return form % (figure[key]['median'] * scale) if key in figure \
                else ''
        rows.append(
            (str(figure['workers']), figure['phase'],
             value('bytes_per_second', 1e-6, '%.0f'),
             value('bytes_per_server_cpu_second', 1e-6, '%.0f MB'),
             value('server_cpu', 1, '%.1f'),
             value('clients_cpu', 1, '%.1f'),
             common.megabytes(figure['server_peak']))
            + tuple(value('%s_%s' % (what, share), 1e3, '%.1f')
                    for what in ('commit', 'get')
                    for share in ('p50', 'p95', 'p99', 'most')))
    common.table(rows)


def options():
    parser = common.parser(__doc__, 1)
    for name, usual, text in (
            ('idle', 1000, 'idle sessions'), ('active', 50, 'busy sessions'),
            ('seconds', 10, 'length of a phase'),
            ('block', 65536, 'bytes of a block'),
            ('blocks', 64, 'blocks of an archive')):
        parser.add_argument(
            '--' + name, type=float if name == 'seconds' else int,
            default=usual, metavar='N', help='%s (%d)' % (text, usual))
    parser.add_argument('--workers', type=common.numbers, default=[1, 2],
                        metavar='N,N', help='numbers of workers (1,2)')
    return common.parse(parser, idle=3, active=2, seconds=.3, workers=[1],
                        block=1000, blocks=3)


def main():
    args = options()
    report = common.Report('load', args)
    print('\n%d idle and %d busy sessions, archives of %d blocks of %d bytes'
          % (args.idle, args.active, args.blocks, args.block))
    for workers in args.workers:
        for _ in range(args.runs):
            with common.Place(args.dir) as place:
                Bench(place, report, args, workers).run()
    show(report)
    report.write()


if __name__ == '__main__':
    main()
