# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What a machine is told of usage and money; what a dry run makes of it."""

import contextlib
import json
import os
import unittest
from unittest import mock

import format_examples
import rawclient
import tarsnap
import tarsnapd
from lab import D, N, R, W, LabTest
from rawclient import here
from tarsnapd import ATTO, DAY, day_parse, money_text
from test_ledger import START, Clocked, turn

PRICES = 'storage-price = 250\nupload-price = 250\ndownload-price = 250\n'
PRICE = 250 * 10 ** 6


class Figures(Clocked):
    """The request, and the view it is answered from."""

    def ask(self, client, flags=b'\1'):
        kind, body = client.call('ACCOUNT', flags)
        self.assertEqual(kind, 'FIGURES')
        return dict(line.split(' ') for line in body.decode().splitlines())

    def two(self):
        """Two machines of joe's that stored something, five days ago."""
        self.good('bill')
        self.credit('5')
        hosts = [self.host(), self.host()]
        for host, count in zip(hosts, (3, 5)):
            host.backup(self.client(host, R, W), 'a', count, 100000)
        self.at(3)
        self.good('bill')
        return hosts

    def test_what_a_machine_is_told(self):
        hosts = self.two()
        days = [[self.usage(host, day) for day in range(3)]
                for host in hosts]
        sums = [{'stored': sum(row.stored for row, _ in one),
                 'up': sum(row.up for row, _ in one), 'down': 0,
                 'charged': sum(sum(amounts) for _, amounts in one)}
                for one in days]
        found = self.ask(self.client(hosts[0], R))
        held = [one[-1][0].bytes for one in days]
        balance = 5 * ATTO - sum(one['charged'] for one in sums)
        self.assertEqual(found, {
            'machine-bytes': str(held[0]), 'price-storage': str(PRICE),
            'price-upload': str(PRICE), 'price-download': str(PRICE),
            'first-day': START, 'last-day': '2026-11-28', 'standing': 'ok',
            'days-left': str(balance // (sum(held) * 8333333)),
            'account-machines': '2', 'account-bytes': str(sum(held)),
            'balance': str(balance),
            **{'machine-' + name: str(value)
               for name, value in sums[0].items()},
            **{'account-' + name: str(value + sums[1][name])
               for name, value in sums[0].items()}})

    def test_the_example_of_the_page(self):
        """It has all that there is, in order, and adds up."""
        text = format_examples.blocks(format_examples.PROTOCOL)[
            'example', 'figures']
        hosts = self.two()
        self.assertEqual(
            [line.split()[0] for line in text.splitlines()],
            list(self.ask(self.client(hosts[0], R))))
        found = tarsnap.figures_parse(text.encode())
        for who in 'machine', 'account':
            self.assertEqual(
                found[who + '-charged'], found[who + '-stored'] * 8333333
                + (found[who + '-up'] + found[who + '-down']) * PRICE)
        self.assertEqual(found['balance'], 10 * ATTO
                         - found['account-charged'])
        self.assertEqual(found['days-left'], found['balance'] // (
            found['account-bytes'] * 8333333))

    def test_a_write_key_alone_learns_of_its_machine_only(self):
        """And of how long there is money; any other role learns all."""
        host, _ = self.two()
        found = self.ask(self.client(host, W))
        self.assertFalse([name for name in found
                          if name.startswith('account') or 'balance' in name])
        self.assertTrue({'machine-charged', 'standing', 'days-left'}
                        <= found.keys())
        for roles in ((D,), (N,), (W, R)):
            self.assertIn('balance', self.ask(self.client(host, *roles)))

    def test_what_was_stored_today_counts(self):
        """Of the machine that asks; of others yesterday is known."""
        hosts = self.two()
        before = self.ask(self.client(hosts[0], R))
        for host in hosts:
            host.backup(self.client(host, R, W), 'b', 4, 90000)
        held = [self.server().run(tarsnapd.catch_up(host.machine)).bytes
                for host in hosts]
        found = self.ask(self.client(hosts[0], R))
        self.assertEqual(found['machine-bytes'], str(held[0]))
        known = int(before['account-bytes']) - int(before['machine-bytes'])
        self.assertLess(known, held[1])
        self.assertEqual(found['account-bytes'], str(known + held[0]))
        self.assertEqual(found['days-left'], str(
            int(found['balance']) // ((known + held[0]) * 8333333)))

    def test_prices_alone(self):
        host, _ = self.two()
        self.assertEqual(
            set(self.ask(self.client(host, W), b'\0')),
            {'machine-bytes', *tarsnap.PRICE_NAMES})

    def test_at_most_once_a_minute(self):
        """Of one connection, as it takes many requests to the store."""
        host, _ = self.two()
        client = self.client(host, R)
        before = self.ask(client)
        self.credit('1')
        self.now += 59
        self.assertEqual(self.ask(client), before)
        self.assertNotEqual(self.ask(self.client(host, R)), before)
        self.now += 1
        self.assertEqual(int(self.ask(client)['balance']),
                         int(before['balance']) + ATTO)

    def test_before_a_day_was_charged(self):
        for words in ((), ('bill',)):
            if words:
                self.good(*words)
            host = self.host()
            found = self.ask(self.client(host, R))
            self.assertNotIn('last-day', found)
            self.assertEqual((found['account-charged'], found['standing']),
                             ('0', 'warned'))

    def test_a_machine_of_nobody(self):
        host = rawclient.Host(self.client())
        self.assertEqual(self.ask(self.client(host, R)),
                         {'machine-bytes': '0'})

    def test_a_month_ends(self):
        """Its last day is not in the sums; what is held then is known."""
        host, other = self.two()
        for day, first, last, days in ((5, None, None, ()), (6, '2026-12-01',
                                       '2026-12-01', (5,))):
            self.at(day)
            self.good('bill')
            for anew in (False, True):
                if anew:
                    os.unlink(os.path.join(self.path, 'ledger.db'))
                found = self.ask(self.client(host, R))
                self.assertEqual((found.get('first-day'),
                                  found.get('last-day')), (first, last))
                charged = sum(sum(self.usage(one, day)[1])
                              for one in (host, other) for day in days)
                self.assertEqual(found['account-charged'], str(charged))
                self.assertEqual(found['account-bytes'], str(sum(
                    self.usage(one, 4)[0].bytes for one in (host, other))))

    def test_a_machine_that_changed_hands(self):
        host, other = self.two()
        rawclient.run('user', self.path, 'add', 'ann', stdin=b'pw\n')
        self.good('user', 'move-machine', '%016x' % host.machine, 'ann')
        self.at(4)
        self.good('bill')
        old = self.ask(self.client(other, R))
        new = self.ask(self.client(host, R))
        self.assertEqual(
            [new[name] for name in ('account-machines', 'account-charged',
                                    'standing')],
            ['1', str(sum(self.usage(host, 3)[1])), 'negative'])
        self.assertEqual(old['account-bytes'],
                         str(self.usage(other, 3)[0].bytes))
        self.assertEqual(old['account-charged'], str(
            sum(sum(self.usage(host, day)[1]) for day in range(3))
            + sum(sum(self.usage(other, day)[1]) for day in range(4))))

    def test_malformed_requests(self):
        host = self.host()
        for body in (b'', b'\1\1'):
            with self.assertRaises(rawclient.Error) as refused:
                self.client(host, R).call('ACCOUNT', body)
            self.assertEqual(refused.exception.code, 'BAD')


class Client(LabTest):
    """`tarsnap --usage` and the cost of a dry run."""

    def charge(self):
        """Have somebody pay for the machine, for three days."""
        with open(os.path.join(self.lab.store, 'tarsnapd.conf'), 'a') as file:
            file.write(PRICES)
        self.now = day_parse(START) * DAY + DAY // 2
        turn(self)
        server = tarsnapd.Server(self.lab.store)
        server.run(tarsnapd.account_create('ann', b'pw'))
        server.close()
        for words in (('bill',), ('user', 'credit', 'ann', '5', '--reason',
                                  'x'),
                      ('user', 'move-machine',
                       '%016x' % self.lab.key.machine, 'ann')):
            self.assertEqual(here(words[0], self.lab.store, *words[1:])[0], 0)
        self.host.create('one')
        self.now += 3 * DAY
        here('bill', self.lab.store)

    def setUp(self):
        super().setUp()
        self.write('file', os.urandom(300000))

    def usage(self, *words, host=None):
        return json.loads((host or self.host).good(
            '--usage', '--json', *words, cache=False).out)

    def test_what_is_shown(self):
        self.charge()
        found = self.usage()
        held = sum(size for _, size in self.lab.live().values())
        self.assertEqual(
            (found['machine']['bytes'], found['machine']['month'],
             found['charged'], found['standing']),
            (held, money_text(held * PRICE), True, 'ok'))
        self.assertEqual(found['account'], dict(
            found['machine'], machines=1, balance=money_text(
                5 * ATTO - int(found['machine']['charged'].replace('.', '')))
        ))
        self.assertEqual(found['prices'], dict.fromkeys(
            ('storage', 'upload', 'download'), '0.000000000250000000'))
        self.assertEqual((found['first_day'], found['last_day']),
                         (START, '2026-11-28'))
        text = self.host.good('--usage', cache=False).out
        self.assertEqual(text.splitlines()[:2], [
            '%-32s  %15s  %15s' % ('', 'This machine', 'Account'),
            '%-32s  %15d  %15d' % ('Stored', held, held)])
        self.assertRegex(text, r'(?m)^Balance +\$4\.9999\d\d$')
        self.assertRegex(text, r'(?m)^Days left +%d$' % found['days_left'])
        self.assertRegex(self.host.good('--usage', '--humanize-numbers',
                                        cache=False).out,
                         r'(?m)^Stored +\d+ kB +\d+ kB$')

    def test_without_money(self):
        """What there is can be seen, and how old it is; no more."""
        self.charge()
        self.assertEqual(here('user', self.lab.store, 'debit', 'ann', '5',
                              '--reason', 'x')[0], 0)
        self.assertEqual(self.host.good('--list-archives').out, 'one\n')
        age = self.host.run('--last-backup-age', '--max-age', '1h')
        self.assertIn('one, ', age.out)
        self.assertEqual(age.status, 0)
        for words in (('-t', '-f', 'one'), ('--verify', '-f', 'one'),
                      ('-x', '-f', 'one', '-C', self.lab.root),
                      ('-c', '-f', 'two', 'file')):
            err = self.host.good(*words, status=1).err
            self.assertIn('Account balance is not positive; add money', err)
            self.assertNotIn('block', err)
        self.host.good('-d', '-f', 'one')
        self.assertEqual(self.host.good('--list-archives').out, '')

    def test_a_write_key(self):
        self.charge()
        host = self.lab.host('w', (W,))
        self.assertNotIn('account', self.usage(host=host))
        text = host.good('--usage', cache=False).out
        self.assertNotIn('Account', text)
        self.assertNotIn('Balance', text)
        self.assertRegex(text, r'(?m)^Standing +ok$')

    def test_nothing_is_charged(self):
        """Also where there is nothing, and where it is over."""
        self.assertEqual(self.usage(), {'type': 'usage', 'charged': False,
                                        'machine': {'bytes': 0}})
        self.host.create('one')
        self.assertEqual(self.host.good('--usage').out.splitlines(), [
            '%-32s  %15s' % ('', 'This machine'),
            '%-32s  %15d' % ('Stored', sum(
                size for _, size in self.lab.live().values())),
            '%-32s  %15s' % ('Charged', 'nothing')])

    def test_what_new_data_would_cost(self):
        """By the prices that the last run saw, asking nobody."""
        words = ('-c', '--dry-run', '--print-stats', '-C', self.lab.tree, '.')
        os.mkdir(self.host.cache)
        before = self.host.good(*words).err
        self.assertEqual(before.count('\n'), 5)
        self.charge()
        self.write('more', os.urandom(100000))
        os.rename(self.lab.store, self.lab.store + '.away')
        err = self.host.good(*words).err
        lines = err.splitlines()
        new = int(lines[4].split()[-1])
        self.assertTrue(lines[4].startswith('New data '))
        self.assertEqual(lines[5:], [
            'New data would cost %s a month, and %s to send'
            % ((tarsnap.money(new * PRICE),) * 2)])
        self.assertEqual(self.host.good(*words[:-3], '--quiet', *words[-3:])
                         .err.count('\n'), 5)
        # The words of a command are stored too: here they are others.
        archive, found = map(json.loads, self.host.good(
            *words[:-3], '--json', *words[-3:]).out.splitlines()[-2:])
        cost = money_text(archive['new_compressed'] * PRICE)
        self.assertEqual(found, {'type': 'cost', 'month': cost,
                                 'upload': cost})

    def test_nobody_asks_where_there_are_no_prices(self):
        """Servers that are older than the request would hang up."""
        with self.lies(b'') as asked:
            self.host.create('one')
        self.assertEqual(asked, [])

    def test_prices_that_are_gone(self):
        self.charge()
        path = os.path.join(self.host.cache, 'prices')
        self.assertTrue(os.path.exists(path))
        conf = os.path.join(self.lab.store, 'tarsnapd.conf')
        with open(conf) as file:
            text = file.read()
        with open(conf, 'w') as file:
            file.write(text.replace(PRICES, ''))
        self.host.create('two')
        self.assertFalse(os.path.exists(path))

    def test_a_file_of_prices_that_is_damaged(self):
        self.charge()
        path = os.path.join(self.host.cache, 'prices')
        words = ('-c', '--dry-run', '--print-stats', '-C', self.lab.tree, '.')
        for noise in (b'', b'\0', b'price-storage x\n', b'price-storage 5\n',
                      b'a 5\n' * 5000):
            with open(path, 'wb') as file:
                file.write(noise)
            self.assertEqual(self.host.good(*words).err.count('\n'), 5)

    def test_answers_of_a_hostile_server(self):
        """One line, whatever it says; and no backup fails for it."""
        self.charge()
        good = b'machine-bytes 5\nprice-storage 1\n'
        for body in (b'', b'\xff\n', b'machine-bytes x\n', good,
                     b'machine-bytes 5', good + b'price-upload 1e9\n',
                     b'machine-bytes ' + b'9' * 41 + b'\n',
                     b'machine-bytes \xd9\xa1\n',
                     b'machine-bytes 5\n' * 300,
                     b'machine-bytes 5\nstanding \x1b[2J\n'):
            with self.lies(body):
                result = self.host.run('--usage', cache=False)
                self.assertEqual((result.status, result.out), (1, ''), body)
                self.assertIn('malformed', result.err)
                self.assertEqual(self.host.run(
                    '-c', '-f', os.urandom(4).hex(), '-C', self.lab.tree,
                    '.').status, 0, body)

    @contextlib.contextmanager
    def lies(self, body):
        """A server that answers ACCOUNT with `body`; what it was asked."""
        asked = []

        def account(session, request):
            asked.append(request)
            yield ('answer', tarsnapd.FIGURES, body)

        with mock.patch.object(tarsnapd.Session, '_account', account):
            yield asked

    def test_an_older_server(self):
        known = {kind: row for kind, row in tarsnapd.REQUESTS.items()
                 if kind != tarsnapd.ACCOUNT}
        with mock.patch.object(tarsnapd, 'REQUESTS', known):
            result = self.host.run('--usage', cache=False)
            self.assertEqual(result.status, 1)
            self.assertIn('The server is older than --usage', result.err)
            self.host.create('one')

    def test_a_ledger_that_cannot_be_read(self):
        self.charge()
        server = tarsnapd.Server(self.lab.store)
        for key in server.accounts.list('usage/' + START):
            server.accounts.delete(key)
            server.accounts.put(key, b'x')
        server.close()
        os.unlink(os.path.join(self.lab.store, 'ledger.db'))
        result = self.host.run('--usage', cache=False)
        self.assertEqual(result.status, 1)
        self.assertRegex(result.err, 'The server failed: .*usage/')
        self.host.create('two')


del Clocked, LabTest


if __name__ == '__main__':
    unittest.main()
