#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Does the ledger add up, whatever happens while it is kept?

usage: tests/books.py [--seed N] [--events N] [--worlds N] [--s3]

A world is a store in memory, or with --s3 in a bucket, and two hosts, each
with a view and a clock of its own.  Events are drawn: machines commit, change
hands and are sent blocks; providers tell of payments, refunds and chargebacks,
mostly twice; operators credit and debit; time goes on by minutes or days; and
hosts bill: twice, days late, both at once step by step, with clocks that went
back, with store requests that fail or only seem to, and killed in the middle.

In the end the ledger must be, byte for byte, that of one clean run over the
same logs, day after day on time; and every balance what a few lines of
arithmetic, which share nothing with the program, make of the events.
"""

import argparse
import bisect
import collections
import contextlib
import fractions
import itertools
import os
import random
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import model        # noqa: E402
import rawclient    # noqa: E402
import s3peers      # noqa: E402
import tarsnapd     # noqa: E402
from tarsnapd import ATTO, DAY, StoreError      # noqa: E402

PRICES = tarsnapd.Prices(250 * 10 ** 6, 250 * 10 ** 6, 125 * 10 ** 6)
STARTS = ('2027-12-20', '2024-01-25', '2026-11-26', '2099-12-30')


class Quiet:
    """Nobody watches the store."""

    def made(self, key, data):
        pass

    deleted = made


class Store(model.Store):
    """Lists some of very many objects without looking at all of them."""

    def __init__(self, clock):
        super().__init__(Quiet(), clock)
        self.sorted = []            # keys, of `of`
        self.of = self.objects

    def put(self, key, data):
        new = super().put(key, data)
        if new and self.of is self.objects:
            bisect.insort(self.sorted, key)
        return new

    def list(self, prefix):
        if self.of is not self.objects:
            self.sorted, self.of = sorted(self.objects), self.objects
        return self.sorted[bisect.bisect_left(self.sorted, prefix):
                           bisect.bisect_left(self.sorted, prefix + '\x7f')]


    def count(self):
        return len(self.objects)


class Bucket(tarsnapd.S3Store):
    """A store of an S3 server."""

    numbers = itertools.count(1)

    def __init__(self):
        super().__init__('s3://books/%d' % next(self.numbers), {})

    @property
    def objects(self):
        """All there are."""
        return {key: self.get(key) for key in self.list('')}

    def count(self):
        return len(self.list(''))


class Dead(Exception):
    """The process that ran these steps was killed."""


class Host:
    """A server that bills: its view, and how wrong its clock is."""

    def __init__(self, path):
        self.view = tarsnapd.View(path)
        self.skew = 0               # seconds


class Books:
    """A world; `rng` draws what happens in it."""

    def __init__(self, rng, directory, start, late=590, store=None):
        self.rng = rng
        self.directory = directory
        self.start = tarsnapd.day_parse(start)
        self.now = self.start * DAY + 12 * 3600
        self.store = store or Store(lambda: self.now)
        self.hosts = [self.host(name) for name in 'ab']
        self.accounts = ['%016x' % rng.getrandbits(64) for _ in range(7)]
        self.machines = {}          # number -> [(time, k, live, up)]
        self.owners = {}            # number -> [(time, account)]
        self.down = collections.Counter()   # (number, day) -> bytes
        self.pieces = collections.Counter()     # (day, stream) -> pieces
        self.money = []             # (account, amount, time, arguments)
        self.late = late            # seconds, of clocks that stamp commits
        self.left = None            # requests to the store until it dies
        self.stats = collections.Counter()
        self.run(tarsnapd.bill(PRICES))     # marks the first day

    def host(self, name):
        return Host(os.path.join(self.directory, name))

    def close(self):
        for host in self.hosts:
            host.view.close()

    # Carrying out steps.

    def perform(self, host, wish, faults=0):
        """What came of a wish; one of 1000 / `faults` fails."""
        verb = wish[0]
        if verb == 'all':
            return [self.quietly(host, x, faults) for x in wish[1]]
        if verb == 'view':
            return host.view.call(wish[1], wish[2:])
        if verb == 'now':
            return self.now + host.skew
        if verb == 'log':
            return None
        self.stats[verb] += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Dead
        fault = self.rng.random() * 1000 < faults
        if fault and self.rng.random() < 0.5:
            self.stats['lost requests'] += 1
            raise StoreError(verb, wish[1], 'lost')
        value = getattr(self.store, verb)(*wish[1:])
        if fault:
            self.stats['lost answers'] += 1
            raise StoreError(verb, wish[1], 'the answer is lost')
        return value

    def quietly(self, host, wish, faults):
        try:
            return self.perform(host, wish, faults)
        except StoreError as e:
            return e

    def steps(self, host, steps, faults=0):
        """Carry `steps` out, pausing after each; True if they ended well."""
        try:
            yield from tarsnapd.turns(
                steps, lambda wish: self.perform(host, wish, faults))
        except StoreError:
            return False
        return True

    def run(self, steps, host=None, faults=0):
        """Carry `steps` out; what they return."""
        return tarsnapd.carry_out(steps, lambda wish: self.perform(
            host or self.hosts[0], wish, faults))

    # What happens.

    def event(self):
        """One event, drawn."""
        kinds = ('commit', 'commit', 'commit', 'send', 'send', 'pay', 'pay',
                 'operator', 'register', 'move', 'pass_time', 'pass_time',
                 'bill')
        kind = self.rng.choice(kinds)
        self.stats[kind] += 1
        getattr(self, kind)()

    def slightly(self):
        """Now, by a clock that may be as wrong as is allowed."""
        return self.now + self.rng.randint(-590, 590)

    def register(self):
        if len(self.machines) >= 40:
            return
        number = self.rng.getrandbits(64) or 1
        self.machines[number], self.owners[number] = [], []
        self.run(tarsnapd.versioned_put('machine/%016x/' % number, 0, {
            'name': 'x', 'user': '', 'keys': '', 'time': self.now}))
        if self.rng.random() < 0.9:
            self.own(number)

    def own(self, number):
        versions = self.owners[number]
        when = max([self.slightly()] + [x for x, _ in versions])
        account = self.rng.choice(self.accounts)
        self.run(tarsnapd.versioned_put(
            tarsnapd.owner_prefix(number), len(versions),
            {'account': account, 'time': when}))
        versions.append((when, account))

    def move(self):
        if self.machines:
            self.own(self.rng.choice(sorted(self.machines)))

    def commit(self):
        if not self.machines:
            return
        number = self.rng.choice(sorted(self.machines))
        done = self.machines[number]
        when = max([self.now + self.rng.randint(-self.late, 590),
                    self.start * DAY] + [x[0] for x in done[-1:]])
        held = self.rng.choice((0, 1, self.rng.randrange(10 ** 12)))
        kind = self.rng.choice((1, 1, 1, 2, None))
        entry = tarsnapd.Entry(number, len(done) + 1, bytes(32), when)
        up = 0
        if kind:
            entry.commit = commit_object(number, kind)
            for i in range(self.rng.randrange(3)):
                size = self.rng.randrange(1, 10 ** 9)
                up += size if kind == 1 else 0
                entry.segments.append(('seg/%d' % i, size, bytes(32), 0, b''))
        entry.bytes = held
        assert self.store.put(tarsnapd.log_key(number, len(done) + 1),
                              tarsnapd.log_encode(entry))
        done.append((when, held, up))

    def send(self):
        """A process writes down what it sent."""
        if not self.machines:
            return
        day = self.slightly() // DAY
        stream = self.rng.choice(('0a', '0b'))
        number = self.pieces[day, stream]
        self.pieces[day, stream] += 1
        key = 'traffic/%s/%s/%06d' % (tarsnapd.day_text(day), stream, number)
        lines = []
        for machine in self.rng.sample(sorted(self.machines), min(
                3, len(self.machines))):
            size = self.rng.randrange(10 ** 8)
            lines.append(('%016x' % machine, size))
            self.down[machine, max(day, self.start)] += size
        self.store.put(key, tarsnapd.lines_encode(key, lines))

    def pay(self):
        """A provider tells of money, for the first time or once more."""
        if self.money and self.rng.random() < 0.4:
            account, _, _, what = self.rng.choice(self.money)
            new = False
        else:
            account, new = self.rng.choice(self.accounts), True
            kind = self.rng.choice(('payment', 'payment', 'payment',
                                    'refund', 'chargeback'))
            amount = self.rng.randrange(1, 50 * ATTO) * tarsnapd.PAID[kind]
            what = (tarsnapd.ledger_pay, self.rng.choice((
                'stripe', 'paypal')), 'cs_%d' % len(self.money), amount, kind)
        self.enter(account, what, new)

    def operator(self):
        kind = self.rng.choice(sorted(tarsnapd.ADJUSTED))
        amount = self.rng.randrange(1, 9 * ATTO)
        if kind == 'adjustment' and self.rng.random() < 0.7:
            amount = -amount
        self.enter(self.rng.choice(self.accounts), (
            tarsnapd.ledger_adjust, 'k%d' % len(self.money), kind, amount,
            'because'), True)

    def enter(self, account, what, new):
        """Enter money, with requests that fail, until it is told of."""
        host = self.rng.choice(self.hosts)
        host.skew = self.slightly() - self.now
        function, *arguments = what
        before = self.store.count()
        times = self.rng.choice((1, 1, 2))
        for i in range(9):
            try:
                self.run(function(account, *arguments), host,
                         100 if i < 5 else 0)
            except StoreError:
                continue
            times -= 1
            if not times:
                break
        assert self.store.count() == before + new, what
        if new:
            amount = [x for x in arguments if isinstance(x, int)][0]
            self.money.append((account, amount, self.now, what))

    def pass_time(self):
        self.now += self.rng.choice((
            60, 3600, 6 * 3600, DAY, self.rng.randrange(3 * DAY), 5 * DAY))

    # Billing, by whoever, whenever.

    def bill(self):
        for host in self.hosts:
            host.skew = self.rng.choice((
                0, 0, -3600, -2 * DAY, -40 * DAY))      # never ahead
        running = [self.billing(host) for host in self.rng.sample(
            self.hosts, self.rng.choice((1, 1, 2)))]
        if len(running) == 1 and self.rng.random() < 0.3:
            running.append(self.billing(running[0].gi_frame.f_locals['host']))
        while running:
            steps = self.rng.choice(running)
            if self.rng.random() < 0.002:
                self.stats['killed'] += 1
                steps.close()
                running.remove(steps)
                continue
            try:
                for _ in range(self.rng.choice((1, 1, 5))):
                    next(steps)
            except StopIteration:
                running.remove(steps)
        if self.rng.random() < 0.1:
            self.stats['views lost'] += 1
            self.rng.choice(self.hosts).view.remove()

    def billing(self, host):
        yield from self.steps(host, self.bill_steps(),
                              self.rng.choice((0, 0, 0, 3)))

    def bill_steps(self):
        """What `tarsnapd bill` does."""
        yield from tarsnapd.bill(PRICES, late=True)
        balances = yield ('view', 'balances')
        yield from tarsnapd.standing_update(balances, PRICES, False)

    # What must be in the end.

    def end(self):
        """Bill all there is on time from now on, and check everything."""
        self.now += 3 * DAY
        host = self.hosts[0]
        host.skew = self.hosts[1].skew = 0
        self.run(tarsnapd.bill(PRICES, late=True), host)
        clean = self.clean()
        mine = self.ledger(self.store)
        for key in sorted(clean.keys() | mine.keys()):
            assert clean.get(key) == mine.get(key), (
                key, clean.get(key), mine.get(key))
        expected = self.expected()
        fresh = self.host('fresh')
        for one in [fresh] + self.hosts:
            self.run(tarsnapd.ledger_catch_up(), one)
            found = one.view.call('balances', ())
            for account in self.accounts:
                assert found.get(account, tarsnapd.Balance(0, 0)).money == (
                    expected[account]), (account, found.get(account),
                                         expected[account])
            assert found == fresh.view.call('balances', ())
        fresh.view.remove()
        self.reports(expected)
        first, last = self.start, self.now // DAY - 1
        for day in self.rng.sample(range(first, last), min(9, last - first)):
            wrong = self.run(tarsnapd.bill_check(day))
            assert wrong == [], wrong

    def reports(self, expected):
        """Each month begins as the one before ended and ends as its closing
        and its statements say, and the last one as it is expected.
        """
        first, ended = tarsnapd.month_days(self.start)[0], {}
        while first <= self.now // DAY:
            _, rows, totals, wrong = self.run(tarsnapd.month_report(first))
            assert wrong == [], wrong
            begun = {row['account']: row['opening'] for row in rows}
            for account, money in ended.items():
                assert begun.get(account, 0) == money, (account, first)
            ended = {row['account']: row['closing'] for row in rows}
            assert sum(ended.values()) == (
                totals['prepaid'] - totals['unpaid']) == (
                totals['opening'] - totals['revenue'] + totals['received']
                + totals['credits'] + totals['adjustments']), totals
            account = self.rng.choice(self.accounts)
            *_, closing, wrong = self.run(tarsnapd.account_statement(
                account, first))
            assert (closing, wrong) == (ended.get(account, 0), []), account
            first = tarsnapd.month_days(first)[1]
        for account in self.accounts:
            assert ended.get(account, 0) == expected[account], account

    def charged(self):
        """{machine: bytes up} that all days together say, after each of
        them was checked; and those that were committed.
        """
        found, committed = collections.Counter(), collections.Counter()
        self.now += 3 * DAY
        self.hosts[0].skew = 0
        self.run(tarsnapd.bill(PRICES, late=True))
        for day in range(self.start, self.now // DAY - 1):
            assert self.run(tarsnapd.bill_check(day)) == []
            for shard in tarsnapd.SHARDS:
                usage = self.run(tarsnapd.usage_get(day, shard))
                for machine, row in usage.rows.items():
                    found[int(machine, 16)] += row.up
        for number, done in self.machines.items():
            committed[number] = sum(up for _, _, up in done)
        return +found, +committed

    def ledger(self, store):
        """The objects that billing makes."""
        return {key: data for key, data in store.objects.items()
                if key.startswith(('usage/', 'closed/', 'ledger/'))}

    def clean(self):
        """The ledger of one host that bills every day in time."""
        kept = self.store, self.now
        self.store = Store(lambda: self.now)
        billed = self.ledger(kept[0])
        self.store.objects = {key: data for key, data
                              in kept[0].objects.items()
                              if key not in billed}
        host = self.host('clean')
        self.now = self.start * DAY
        self.run(tarsnapd.bill(PRICES), host)
        while self.now < kept[1]:
            self.now = min(self.now + DAY, kept[1])
            self.run(tarsnapd.bill(PRICES), host)
        host.view.remove()
        found, (self.store, self.now) = self.ledger(self.store), kept
        return found

    def expected(self):
        """{account: balance}: the arithmetic, by seconds and fractions."""
        balance = collections.Counter()
        for account, amount, _, _ in self.money:
            balance[account] += amount
        last = (self.now - 600) // DAY - 1
        for day in range(self.start, last + 1):
            date = time.gmtime(day * DAY)
            after = [d for d in range(day + 1, day + 33)
                     if time.gmtime(d * DAY).tm_mday == 1][0]
            length = after - (day - date.tm_mday + 1)
            price = PRICES.storage // length
            for number, done in self.machines.items():
                owner = [account for when, account in self.owners[number]
                         if when < (day + 1) * DAY][-1:]
                if owner:
                    balance[owner[0]] -= self.day_amount(number, done, day,
                                                         price)
        return balance

    def day_amount(self, number, done, day, price):
        start, end = day * DAY, (day + 1) * DAY
        up, area = 0, fractions.Fraction(0)
        for i, (when, held, sent) in enumerate(done):
            if when // DAY == day:
                up += sent
            until = done[i + 1][0] if i + 1 < len(done) else end
            seconds = min(until, end) - max(when, start)
            if seconds > 0:
                area += fractions.Fraction(held * seconds, DAY)
        return (int(area) * price + up * PRICES.up
                + self.down[number, day] * PRICES.down)


def commit_object(number, kind):
    """A commit as far as billing looks at it."""
    return b''.join([
        b'tarsnap-commit-1', rawclient.u64(number), rawclient.u64(1),
        bytes(32), bytes([kind]), bytes(16), bytes(4), bytes(80), bytes(32),
        bytes(2), bytes(64)])


def explore(seed, events, store=None):
    """One world of so many events; its stats.  AssertionError if the ledger
    is not what it must be.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        books = Books(rng, directory, STARTS[seed % len(STARTS)],
                      store=store)
        try:
            for _ in range(events):
                books.event()
            books.end()
        finally:
            books.close()
        return books.stats


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split('\n\n')[1][7:])
    parser.add_argument('--seed', type=int, default=None)
    parser.add_argument('--events', type=int, default=10000)
    parser.add_argument('--worlds', type=int, default=1)
    parser.add_argument('--s3', action='store_true', help='on moto')
    options = parser.parse_args()
    from world import seed_choose
    first = options.seed if options.seed is not None else seed_choose('books')
    stats = collections.Counter()
    with s3peers.bucket('books') if options.s3 else contextlib.nullcontext():
        for seed in range(first, first + options.worlds):
            stats.update(explore(seed, options.events,
                                 Bucket() if options.s3 else None))
    print('seeds %d to %d, %d events each: %s' % (
        first, first + options.worlds - 1, options.events,
        ', '.join('%s %d' % x for x in sorted(stats.items()))))


if __name__ == '__main__':
    sys.exit(main())
