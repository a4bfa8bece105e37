#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""How long does it take to bill many accounts, and how large does that get?

usage: bench/bill.py [--accounts N] [--machines N] [--days N] [--quick]

Makes a server directory with N accounts, paid for and with addresses, and N
machines of theirs, each with a log entry, and runs `tarsnapd bill` on it, as a
process, with a clock of its own: the first day, on which every account gets a
standing; some ordinary days, on each of which one machine in ten commits; the
last of a month, which is closed; and the day after somebody took all the
money, on which all standings change and every owner is mailed.  For each it
prints seconds, and seconds of processor time, which count where a machine is
busy.  At the end: what is stored for an account and a year.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, '..', 'tests'), os.path.join(HERE, '..')]

import books            # noqa: E402
import rawclient        # noqa: E402
import tarsnapd         # noqa: E402
from tarsnapd import ATTO, DAY      # noqa: E402

START = '2026-11-26'
CONF = ('storage-price = 250\nupload-price = 250\ndownload-price = 250\n'
        'mail-from = Backups <backups@example.org>\n')
# `bill` at the time its first word says.
CLOCK = '''\
import sys, time
now = int(sys.argv.pop(1))
sys.path.insert(0, sys.argv.pop(1))
import tarsnapd
time.time = lambda: now
sys.exit(tarsnapd.main(sys.argv[1:]))
'''


class Service:
    """A server directory with accounts and machines; `rng` draws them."""

    def __init__(self, path, accounts, machines, rng):
        self.path = path
        self.rng = rng
        self.start = tarsnapd.day_parse(START)
        tarsnapd.server_create(path, {'accounts': 'accounts'})
        with open(os.path.join(path, 'tarsnapd.conf'), 'a') as file:
            file.write(CONF)
        server = tarsnapd.Server(path)
        server.run(tarsnapd.start_make(self.start))
        self.idents = ['%016x' % rng.getrandbits(64) for _ in range(accounts)]
        self.machines = [rng.getrandbits(64) or 1 for _ in range(machines)]
        self.last = {}              # machine -> (k, hash of that entry)
        # What is durable is no matter before the clock runs.
        server.accounts.put = self.putter(server.accounts.root)
        server.store.put = self.putter(server.store.root)
        for number, ident in enumerate(self.idents):
            self.account(server, number, ident)
        for number, machine in enumerate(self.machines):
            self.machine(server, machine, self.idents[number % accounts])
        server.close()

    @staticmethod
    def putter(root):
        def put(key, data):
            path = os.path.join(root, key)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'wb') as file:
                file.write(data)
            return True
        return put

    def account(self, server, number, ident):
        """One that has paid; it is not logged into here."""
        server.run(tarsnapd.versioned_put(tarsnapd.account_prefix(ident), 0, {
            'id': ident, 'address': 'user%d@example.org' % number,
            'created': self.start * DAY, 'salt': 64 * '0', 'logN': 15,
            'r': 8, 'p': 1, 'stored': 64 * '0'}))
        server.run(tarsnapd.ledger_pay(ident, 'bank', '1', 100 * ATTO))

    def machine(self, server, machine, ident):
        server.run(tarsnapd.versioned_put('machine/%016x/' % machine, 0, {
            'name': 'host', 'user': '', 'keys': 256 * '0', 'time': 0}))
        server.run(tarsnapd.owner_set(machine, ident, 'host'))
        self.commit(server, machine, self.start)

    def commit(self, server, machine, day):
        """A log entry of a write, at noon of `day`."""
        k, before = self.last.get(machine, (0, bytes(32)))
        entry = tarsnapd.Entry(machine, k + 1, before, day * DAY + DAY // 2)
        entry.commit = books.commit_object(machine, 1)
        entry.segments.append(('seg/0', self.rng.randrange(10 ** 8),
                               bytes(32), 0, b''))
        entry.bytes = self.rng.randrange(10 ** 9, 10 ** 10)
        data = tarsnapd.log_encode(entry)
        server.store.put(tarsnapd.log_key(machine, k + 1), data)
        self.last[machine] = k + 1, rawclient.sha(data)

    def day(self, day):
        """One machine in ten commits."""
        server = tarsnapd.Server(self.path)
        server.store.put = self.putter(server.store.root)
        for machine in self.rng.sample(self.machines,
                                       len(self.machines) // 10):
            self.commit(server, machine, day)
        server.close()

    def poor(self):
        """All the money is gone."""
        server = tarsnapd.Server(self.path)
        server.accounts.put = self.putter(server.accounts.root)
        for ident in self.idents:
            server.run(tarsnapd.ledger_adjust(
                ident, 'gone', 'adjustment', -100 * ATTO, 'bench'))
        server.close()

    def bill(self, day):
        """Bill all up to `day` early on the next; (seconds, of CPU)."""
        os.sync()                   # what was made before is not its doing
        now = (day + 1) * DAY + 3600
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.monotonic()
        subprocess.run([sys.executable, '-c', CLOCK, '%d' % now,
                        os.path.dirname(HERE), 'bill', self.path],
                       check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return seconds, (after.ru_utime + after.ru_stime
                         - before.ru_utime - before.ru_stime)

    def stored(self, *places):
        """{place: bytes} of the objects of accounts."""
        server = tarsnapd.Server(self.path)
        found = {place: sum(server.accounts.size(key) for key in
                            server.accounts.list(place + '/'))
                 for place in places}
        server.close()
        return found


def measure(service, days):
    """[(name, seconds, CPU seconds)]: the days of this benchmark."""
    found, day = [], service.start
    found.append(('first day', *service.bill(day)))
    for number in range(days):
        day += 1
        service.day(day)
        found.append(('ordinary day %d' % (number + 1), *service.bill(day)))
    usage = service.stored('usage')['usage'] / (day - service.start + 1)
    last = tarsnapd.month_days(day)[1] - 1
    for day in range(day + 1, last):
        service.bill(day)
    service.day(last)
    found.append(('end of a month', *service.bill(last)))
    service.poor()
    service.day(last + 1)
    found.append(('all standings change', *service.bill(last + 1)))
    return found, usage


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--accounts', type=int, default=10000)
    parser.add_argument('--machines', type=int, default=30000)
    parser.add_argument('--days', type=int, default=2)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--quick', action='store_true',
                        help='100 accounts, 300 machines, one day')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    if args.quick:
        args.accounts, args.machines, args.days = 100, 300, 1
    with tempfile.TemporaryDirectory() as base:
        service = Service(os.path.join(base, 'srv'), args.accounts,
                          args.machines, random.Random(args.seed))
        figures, usage = measure(service, args.days)
        sizes = service.stored('closed', 'pay', 'adjust', 'standing', 'mail')
    print('%d accounts, %d machines' % (args.accounts, args.machines))
    for name, seconds, cpu in figures:
        print('%-22s %7.1f s %7.1f s of CPU' % (name, seconds, cpu))
    year = {'usage': usage * 365, 'closings': sizes['closed'] * 12}
    for name, size in year.items():
        print('%-22s %7.1f kB for an account and a year' % (
            name, size / args.accounts / 1000))
    for name in ('pay', 'standing', 'mail'):
        print('%-22s %7.0f bytes for each' % (name, sizes[name]
                                              / args.accounts))
    if args.json:
        with open(args.json, 'w') as file:
            json.dump({'arguments': vars(args), 'figures': figures,
                       'year': year, 'sizes': sizes}, file, indent=1)
    return 0


if __name__ == '__main__':
    sys.exit(main())
