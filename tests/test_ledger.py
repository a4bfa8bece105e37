# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The ledger on a real server directory: usage, money, and what it allows."""

import os
import unittest
from unittest import mock

import rawclient
import tarsnapd
from lab import LabTest
from rawclient import (
    ABORT_KIND, D, DELETE_KIND, N, NUKE_KIND, Client, Embedded, Error, Host,
    R, Serve, W, block, get, here, put, server_directory)
from tarsnapd import ATTO, DAY, ServerError, day_parse, money_text

START = '2026-11-26'
MORNING = 8 * 3600


def turn(case):
    """Let servers of this process have the clock `case.now`, for a test."""
    perform = tarsnapd.Server.perform_here
    patch = mock.patch.object(
        tarsnapd.Server, 'perform_here', lambda server, wish: (
            case.now if wish == ('now',) else perform(server, wish)))
    patch.start()
    case.addCleanup(patch.stop)


class Clocked(unittest.TestCase):
    """A server directory with prices, and a clock that a test turns."""

    PLACES = {}                 # where store and accounts are
    PRICES = 'storage-price = 250\nupload-price = 250\ndownload-price = 250\n'

    def setUp(self):
        self.path = server_directory(self, self.PLACES)
        self.conf(self.PRICES)
        self.now = day_parse(START) * DAY + MORNING
        turn(self)

    def conf(self, text):
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write(text)

    def good(self, *words):
        status, out, err = here(words[0], self.path, *words[1:])
        self.assertEqual((status, err), (0, ''))
        return out

    def wrong(self, says, *words, status=1):
        found, out, err = here(words[0], self.path, *words[1:])
        self.assertEqual((found, err.count('\n')), (status, 1), err)
        self.assertIn(says, err)

    def at(self, day, hour=8):
        """Let it be so many days after the start."""
        self.now = (day_parse(START) + day) * DAY + hour * 3600

    def client(self, host=None, *roles):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        if host:
            client.auth(host.machine, host.keys, *roles)
        return client

    def host(self):
        return Host(self.client(), user='joe', password=b'pw')

    def server(self):
        server = tarsnapd.Server(self.path)
        self.addCleanup(server.close)
        return server

    def usage(self, host, day):
        """(Used, amounts) of a machine on a day after the start."""
        usage = self.server().run(tarsnapd.usage_get(
            day_parse(START) + day, ('%016x' % host.machine)[0]))
        machine = '%016x' % host.machine
        return usage.rows[machine], usage.amounts(machine)

    def show(self):
        return dict(line.split(' ', 1)
                    for line in self.good('user', 'show', 'joe').splitlines())

    def credit(self, dollars='5', *more):
        return self.good('user', 'credit', 'joe', dollars, '--reason',
                         'welcome', *more)


class Arithmetic(unittest.TestCase):

    def test_golden_line(self):
        """2020-05-07 of a real account, to all 18 digits."""
        price = tarsnapd.price_of_day(250 * 10 ** 6, day_parse('2020-05-07'))
        self.assertEqual(price, 8064516)
        self.assertEqual(money_text(259688348 * price),
                         '0.002094260837459568')

    def test_price_is_rounded_down_by_the_days_of_its_month(self):
        for day, price in (('2021-02-28', 8928571), ('2020-02-29', 8620689),
                           ('2020-04-01', 8333333), ('2020-05-31', 8064516),
                           ('2100-02-01', 8928571), ('2000-02-01', 8620689)):
            self.assertEqual(tarsnapd.price_of_day(
                250 * 10 ** 6, day_parse(day)), price, day)

    def test_amounts_as_text(self):
        for text in ('0.000000000000000001', '12.500000000000000000',
                     '999999999999.000000000000000000'):
            self.assertEqual(money_text(tarsnapd.money_parse(text)), text)
        self.assertEqual(money_text(-1), '-0.000000000000000001')
        self.assertEqual(money_text(-ATTO * 3 // 2), '-1.' + '5' + 17 * '0')
        for text in ('', '.', '.5', '-1', '1e3', '0.0000000000000000001',
                     '1,5', '\u0661', '1' * 13, '1.2.3', ' 1'):
            with self.assertRaises(ServerError, msg=text):
                tarsnapd.money_parse(text)

    def test_byte_days(self):
        """By the second; the day's sum is rounded down, once."""
        start = 20000 * DAY
        stored = tarsnapd.stored_days
        self.assertEqual(stored([], 1000, start), 1000)
        noon = (1, start + DAY // 2, 3000, 0)
        self.assertEqual(stored([noon], 1000, start), 2000)
        self.assertEqual(stored([noon, (2, start + DAY * 3 // 4, 0, 0)], 1000,
                                start), 500 + 750)
        self.assertEqual(stored([(1, start + DAY - 1, 86399, 0)], 0, start),
                         0)
        self.assertEqual(stored([(1, start + DAY - 1, 86400, 0)], 0, start),
                         1)
        # One that comes late counts from the start of the day.
        self.assertEqual(stored([(1, start - 50, 500, 0)], 7000, start), 500)


class Days(Clocked):

    def test_life_of_a_machine(self):
        """Also a day without a commit is charged; deleting helps."""
        self.assertEqual(self.good('bill'), '')
        self.credit()
        host = self.host()
        one = self.client(host, R, W, D, N)
        host.backup(one, 'a', 4, 100000)
        held = self.server().run(tarsnapd.catch_up(host.machine)).bytes
        self.at(2)
        out = self.good('bill').splitlines()
        self.assertEqual(len(out), 2)
        self.assertIn('2026-11-26: 1 machines, ', out[0])
        row, amounts = self.usage(host, 0)
        self.assertEqual((row.bytes, row.stored), (held, held * 2 // 3))
        self.assertTrue(held < row.up < held * 1.01, row)
        self.assertEqual(amounts, (held * 2 // 3 * 8333333,
                                   row.up * 250 * 10 ** 6, 0))
        second, _ = self.usage(host, 1)
        self.assertEqual(second, row._replace(stored=held, up=0))
        spent = sum(amounts) + held * 8333333
        self.assertEqual(self.show()['balance'], money_text(5 * ATTO - spent))
        # A month of 31 days, and a nuke at noon.
        self.at(5, 12)
        commit = host.build(os.urandom(16), NUKE_KIND)
        one.call('NUKE', commit)
        self.at(7)
        self.good('bill')
        row, amounts = self.usage(host, 5)
        self.assertEqual((row.bytes, row.stored, row.up), (0, held // 2, 0))
        self.assertEqual(amounts[0], held // 2 * 8064516)
        self.assertEqual(self.usage(host, 6)[0].stored, 0)
        self.assertEqual(self.show()['days-left'], '-')
        for day in range(7):
            self.good('bill', '--check', tarsnapd.day_text(
                day_parse(START) + day))
        self.assertIn('2026-12-02: as in the logs',
                      self.good('bill', '--check'))

    def test_what_was_before_is_free(self):
        self.credit()
        host = self.host()
        self.at(-3)
        host.backup(self.client(host, R, W), 'old')
        self.at(0)
        self.good('bill')
        self.at(1)
        self.good('bill')
        row, _ = self.usage(host, 0)
        self.assertEqual((row.up, row.stored), (0, row.bytes))
        self.assertGreater(row.bytes, 0)

    def test_what_a_slow_clock_commits_is_charged_once(self):
        self.good('bill')
        self.credit()
        host = self.host()
        one = self.client(host, R, W)
        self.at(1)
        self.good('bill')
        self.at(0, 23)                  # of this server it is yesterday
        host.backup(one, 'late', 2, 50000)
        self.at(3)
        self.good('bill')
        first, second = [self.usage(host, day)[0] for day in (1, 2)]
        self.assertEqual(first.stored, first.bytes)
        self.assertGreater(first.up, 100000)
        self.assertEqual(second, first._replace(up=0))
        self.good('bill', '--check', '2026-11-26')

    def test_downloads(self):
        self.good('bill')
        self.credit()
        host = self.host()
        client = Client(Embedded(self.path))
        client.auth(host.machine, host.keys, R, W)
        _, _, names = host.backup(client, 'a', 3, 70000)
        body = b'\x03' + (3).to_bytes(2, 'big') + b''.join(names)
        sent = sum(len(body) for _, body in client.stream('GET', body))
        client.close()                  # writes it down
        self.at(1)
        self.good('bill')
        self.assertEqual(self.usage(host, 0)[0].down, sent)
        self.at(2)
        self.good('bill')
        self.assertEqual(self.usage(host, 1)[0].down, 0)

    def test_downloads_whose_writing_fails_are_written_once(self):
        """The very same piece is tried again; also by two threads."""
        server, traffic = self.server(), tarsnapd.Traffic()
        traffic.add(5, 100)
        piece = traffic.take(20000)
        traffic.add(5, 10)
        self.assertIs(traffic.take(20001), piece)
        server.run(tarsnapd.traffic_flush(traffic))
        traffic.written(piece)
        found = {day: server.run(tarsnapd.traffic_load(day)) for day in
                 (20000, day_parse(START))}
        self.assertEqual([list(x.values()) for x in found.values()],
                         [[[{'%016x' % 5: 100}]], [[{'%016x' % 5: 10}]]])

    def test_another_owner(self):
        self.good('bill')
        self.credit()
        host = self.host()
        host.backup(self.client(host, R, W), 'a')
        rawclient.run('user', self.path, 'add', 'ann', stdin=b'pw\n')
        self.at(2)
        self.good('user', 'move-machine', '%016x' % host.machine, 'ann')
        self.at(3)
        self.good('bill')
        owners = [self.usage(host, day)[0].account for day in range(3)]
        self.assertEqual(owners[0], owners[1])
        self.assertNotEqual(owners[1], owners[2])

    def test_dry_run_writes_nothing(self):
        self.good('bill')
        self.credit()
        host = self.host()
        host.backup(self.client(host, R, W), 'a')
        self.at(5)
        files = self.server().accounts.list('')
        dry = self.good('bill', '--dry-run')
        self.assertEqual(self.server().accounts.list(''), files)
        self.assertEqual(dry.replace(', not charged', ''),
                         self.good('bill').split('joe is')[0])
        self.assertGreater(len(self.server().accounts.list('')), len(files))

    def test_a_clock_far_off(self):
        self.good('bill')
        self.at(4000)
        self.wrong('4000 days from 2026-11-26 on are to be billed', 'bill')
        self.at(32)
        self.wrong('32 days', 'bill', '--dry-run')
        self.assertEqual(len(self.good(
            'bill', '--late', '--dry-run').splitlines()), 32)

    def test_a_day_that_was_altered(self):
        self.good('bill')
        self.credit()
        host = self.host()
        host.backup(self.client(host, R, W), 'a')
        self.at(1)
        self.good('bill')
        server = self.server()
        day, shard = day_parse(START), ('%016x' % host.machine)[0]
        usage = server.run(tarsnapd.usage_get(day, shard))
        machine = '%016x' % host.machine
        row = usage.rows[machine]
        usage.rows[machine] = row._replace(stored=row.stored + 1)
        server.accounts.delete(usage.key())
        server.accounts.put(usage.key(), usage.encode())
        self.wrong('machine %s: ' % machine, 'bill', '--check', START,
                   status=2)
        data = usage.encode().replace(b'prices 8', b'prices 9')
        server.accounts.delete(usage.key())
        server.accounts.put(usage.key(), data)
        self.wrong('checksum does not match', 'bill', '--check', START,
                   status=2)

    def test_scrub_names_what_is_damaged(self):
        """One byte of an object of each kind."""
        self.credit()
        self.good('bill')
        host = self.host()
        host.backup(self.client(host, R, W), 'a')
        server = self.server()
        ident = server.run(tarsnapd.account_need('joe'))[1]['id']
        server.run(tarsnapd.ledger_pay(ident, 'paypal', 'x', 5))
        server.traffic.add(host.machine, 7)
        server.run(tarsnapd.traffic_flush(server.traffic))
        self.at(7)
        self.good('bill')
        self.assertIn(': 0 damaged', self.good('scrub'))
        for place in ('ledger', 'usage', 'traffic', 'pay', 'adjust',
                      'standing', 'closed'):
            key = server.accounts.list(place + '/')[0]
            data = server.accounts.get(key)
            for noise in (data[:5] + bytes([data[5] ^ 1]) + data[6:], data):
                server.accounts.delete(key)
                server.accounts.put(key, noise)
                status, _, err = here('scrub', self.path)
                self.assertEqual((status, key in err),
                                 (0, False) if noise == data else (2, True))

    def test_wrong_words(self):
        for says, words in (
                ('was not billed', ('bill', '--check', '2026-11-01')),
                ('not a day', ('bill', '--check', 'yesterday')),
                ('for bill --check only', ('bill', '2026-11-01')),
                ('unknown option', ('bill', '--all')),
                ('not an amount', ('user', 'credit', 'joe', 'much',
                                   '--reason', 'x')),
                ('--reason', ('user', 'credit', 'joe', '5')),
                ('--reason', ('user', 'debit', 'joe', '0', '--reason', 'x')),
                ('for credit and debit', ('user', 'show', 'joe', '--key',
                                          'x')),
                ('does not exist', ('user', 'credit', 'eve', '5', '--reason',
                                    'x')),
                ('1 to 200 letters', ('user', 'credit', 'joe', '5',
                                      '--reason', 'x', '--key', '../x'))):
            with self.subTest(words):
                self.wrong(says, *words)
        self.conf('amnesty = perhaps\n')
        self.wrong('amnesty is yes or no', 'bill')


class Access(Clocked):

    def refused(self, client, host):
        with self.assertRaisesRegex(
                Error, r'FUNDS: the balance of the account is -?\d+\.\d{18} '
                'dollars: archives can be deleted'):
            host.begin(client, os.urandom(16))
        with self.assertRaisesRegex(Error, 'FUNDS'):
            client.stream('GET', b'\x03' + (1).to_bytes(2, 'big')
                          + self.names[0])

    def test_without_money(self):
        """No writing and no reading; logins and deletes go on."""
        self.good('bill')
        self.credit('0.00007')
        host = self.host()
        one = self.client(host, R, W, D)
        archive, record, self.names = host.backup(one, 'a', 3, 100000)
        self.at(2)
        self.assertIn('joe is negative: balance -0.0', self.good('bill'))
        self.refused(one, host)
        two = self.client(host, R, W, D)
        self.refused(two, host)
        self.assertEqual(two.stream('LIST', bytes(2))[-1][0], 'ARCHIVES')
        tid = os.urandom(16)
        host.begin(two, tid, DELETE_KIND)
        host.commit(two, tid, kind=ABORT_KIND)
        # Paid: at once, in the session that was refused.
        self.credit('1')
        host.begin(two, os.urandom(16))
        self.assertIn('ok since', self.show()['standing'])

    def test_what_has_begun_is_finished_within_a_day(self):
        """Else one that checkpoints for ever were never refused."""
        self.good('bill')
        self.credit('0.00007')
        host = self.host()
        one = self.client(host, R, W, D)
        host.backup(one, 'a', 3, 100000)
        tid = os.urandom(16)
        self.at(1, 22)
        host.begin(one, tid)

        def checkpoint(frame, names=()):
            names = [*names, put(one, block('c', '%d' % self.now, 1000)),
                     put(one, block('c', frame, 1000))]
            host.commit(one, tid, puts=names, frame=frame)

        self.at(2)
        self.assertIn('joe is negative: balance -0.0', self.good('bill'))
        checkpoint('CHECKPOINT')
        self.at(2, 23)
        late = put(one, block('c', 'late', 1000))
        with self.assertRaisesRegex(Error, 'FUNDS'):
            host.commit(one, tid, puts=[late], frame='CHECKPOINT')
        with self.assertRaisesRegex(Error, 'FUNDS'):
            host.commit(one, tid, puts=[late])
        # What came is there when it is paid for.
        self.credit('1')
        checkpoint('COMMIT', [late])

    def test_a_new_account_pays_first(self):
        host = self.host()
        one = self.client(host, R, W)
        with self.assertRaisesRegex(Error, 'FUNDS.* is 0.0'):
            host.begin(one, os.urandom(16))
        self.credit()
        host.backup(one, 'a')

    def test_a_damaged_view_is_made_anew(self):
        self.good('bill')
        self.credit('3')
        for noise in (b'no database at all' * 300, b''):
            with open(os.path.join(self.path, 'ledger.db'), 'wb') as file:
                file.write(noise)
            for suffix in ('-wal', '-shm'):
                tarsnapd.unlink_quietly(os.path.join(
                    self.path, 'ledger.db' + suffix))
            server = self.server()
            for again in (True, False):
                try:
                    server.run(tarsnapd.ledger_catch_up())
                except tarsnapd.StoreError:
                    self.assertTrue(again)
            server.close()
        self.assertEqual(self.show()['balance'], money_text(3 * ATTO))

    def test_a_damaged_ledger_stops_no_backup(self):
        self.good('bill')
        host = self.host()
        server = self.server()
        server.accounts.delete('ledger/start')
        server.accounts.put('ledger/start', b'day 1999-01-01\nsum 0\n')
        status, _, err = here('bill', self.path)
        self.assertEqual((status, err.count('\n')), (1, 1))
        self.assertIn('ledger/start: checksum', err)
        host.backup(self.client(host, R, W), 'a')

    def test_amnesty(self):
        host = self.host()
        self.conf('amnesty = yes\n')
        host.backup(self.client(host, R, W), 'a')

    def test_prices_of_nothing(self):
        """Where all are 0 nobody is refused, warned or erased, whatever was
        before; days are charged with nothing, for the pages.
        """
        self.good('bill')
        self.good('user', 'debit', 'joe', '3', '--reason', 'x')
        host = self.host()
        with self.assertRaisesRegex(Error, 'FUNDS'):
            host.begin(self.client(host, R, W), os.urandom(16))
        self.at(9)
        self.assertIn('joe is deletable', self.good('bill'))
        name = os.path.join(self.path, 'tarsnapd.conf')
        with open(name) as file:
            before = file.read()
        with open(name, 'w') as file:
            file.write(before.replace('= 250', '= 0'))
        client = self.client(host, R, W)
        names = host.backup(client, 'a', 2)[2]
        self.assertEqual(len(get(client, names)), 2)
        self.at(11)
        self.assertIn('joe is ok: balance -3.000', self.good('bill'))
        self.wrong('is not closed', 'user', 'erase', 'joe')
        row, amounts = self.usage(host, 9)
        self.assertGreater(row.stored, 0)
        self.assertEqual(amounts, (0, 0, 0))
        self.good('user', 'credit', 'joe', '3', '--reason', 'y')
        self.assertEqual(self.show()['standing'].split()[0], 'ok')
        with open(name, 'w') as file:   # one of them is enough
            file.write(before.replace('storage-price = 250',
                                      'storage-price = 0'))
        self.good('user', 'debit', 'joe', '1', '--reason', 'z')
        with self.assertRaisesRegex(Error, 'FUNDS'):
            host.begin(self.client(host, R, W), os.urandom(16))

    def test_a_machine_of_nobody_is_free(self):
        self.good('bill')
        host = Host(self.client())
        host.backup(self.client(host, R, W), 'a')
        self.at(1)
        self.assertIn(' 0.000000000000000000 dollars', self.good('bill'))
        row, amounts = self.usage(host, 0)
        self.assertGreater(row.stored, 0)
        self.assertEqual((row.account, amounts), ('-', (0, 0, 0)))

    def test_steps_down_and_up(self):
        """ok, warned, negative, deletable; back by what is paid."""
        self.good('bill')
        host = self.host()
        self.credit('1')
        host.backup(self.client(host, R, W), 'a', 4, 200000)
        self.at(1)
        self.good('bill')
        daily = self.usage(host, 0)[0].bytes * 8333333
        left = int(self.show()['balance'].replace('.', ''))
        self.good('user', 'debit', 'joe', money_text(left - 8 * daily),
                  '--reason', 'test')
        self.assertEqual(self.show()['days-left'], '8')
        seen = []
        for day in range(2, 22):
            self.at(day)
            for line in self.good('bill').splitlines():
                if ' is ' in line:
                    seen.append((day, line.split()[2].strip(':')))
        self.assertEqual([state for _, state in seen],
                         ['warned', 'negative', 'deletable'])
        days = [day for day, _ in seen]
        self.assertEqual(days[2] - days[1], 7)
        self.credit('1')
        self.assertIn('ok since', self.show()['standing'])

    def test_a_key_is_entered_once(self):
        self.credit('5', '--key', 'a')
        status, out, err = here('user', self.path, 'credit', 'joe', '5',
                                '--reason', 'again', '--key', 'a')
        self.assertEqual((status, out),
                         (0, 'balance %s\n' % money_text(5 * ATTO)))
        self.assertIn('entered before', err)
        self.wrong('is entered already: credit 5.0', 'user', 'credit', 'joe',
                   '6', '--reason', 'other', '--key', 'a')

    def test_payments(self):
        """By provider; what happened twice is entered once."""
        server = self.server()
        ident = server.run(tarsnapd.account_need('joe'))[1]['id']
        for _ in range(2):
            for session, amount, kind in (
                    ('cs_1', 10 * ATTO, 'payment'),
                    ('re_1', -3 * ATTO, 'refund'),
                    ('dp_1', -2 * ATTO, 'chargeback')):
                server.run(tarsnapd.ledger_pay(ident, 'stripe', session,
                                               amount, kind))
        self.assertEqual(self.show()['balance'], money_text(5 * ATTO))


class Network(unittest.TestCase):

    def test_what_a_server_sent_is_written_when_it_ends(self):
        """Also by workers, each for itself."""
        path = server_directory(self)
        with open(os.path.join(path, 'tarsnapd.conf'), 'a') as file:
            file.write('download-price = 250\n')
        here('user', path, 'credit', 'joe', '1', '--reason', 'x')
        serve = Serve(path, '--workers', '2')
        sent = 0
        for label in 'abcd':
            client = serve.client()
            host = Host(client, user='joe', password=b'pw')
            client.auth(host.machine, host.keys, R, W)
            _, _, names = host.backup(client, label, 2, 20000)
            sent += sum(len(body) for _, body in client.stream(
                'GET', b'\x03' + (2).to_bytes(2, 'big') + b''.join(
                    names[:2])))
            client.close()
        self.assertEqual(serve.stop()[0], 0)
        server = tarsnapd.Server(path)
        self.addCleanup(server.close)
        pieces = [server.accounts.get(key)
                  for key in server.accounts.list('traffic/')]
        self.assertEqual(sent, sum(
            int(line.split()[1]) for piece in pieces
            for line in piece.splitlines()[:-1]))


class Program(LabTest):
    """What the client says and does when there is no money."""

    def test_without_money(self):
        self.write('one', b'one')
        self.host.create('one')
        self.host.create('two')
        with open(os.path.join(self.lab.store, 'tarsnapd.conf'), 'a') as file:
            file.write('storage-price = 250\n')
        self.assertEqual(rawclient.run('user', self.lab.store, 'add', 'ann',
                                       stdin=b'pw\n')[0], 0)
        here('user', self.lab.store, 'move-machine',
             '%016x' % self.lab.key.machine, 'ann')
        os.mkdir(self.lab.path('out'))
        says = 'balance is not positive; add money'
        for words in (('-c', '-f', 'three', '-C', self.lab.tree, '.'),
                      ('-x', '-f', 'two', '-C', self.lab.path('out'))):
            result = self.host.run(*words)
            self.assertEqual(result.status, 1)
            self.assertIn(says, result.err)
        self.host.good('-d', '-f', 'one')
        self.host.good('--print-stats')
        here('user', self.lab.store, 'credit', 'ann', '1', '--reason', 'x')
        self.host.create('three')
        self.assertEqual(sorted(self.host.good(
            '--list-archives').out.split()), ['three', 'two'])


if __name__ == '__main__':
    unittest.main()
