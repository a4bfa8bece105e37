# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What a month was: it adds up, is safe to open, and nobody waits for it."""

import csv
import io
import json
import os
import sqlite3
import unittest

import tarsnapd
from rawclient import R, W, D, Host, here
from tarsnapd import ATTO, DAY, day_parse, money_text
from test_ledger import START, Clocked


class Reports(Clocked):

    def report(self, month='2026-11', *more):
        return json.loads(self.good('report', '--month', month, '--json',
                                    *more))

    def rows(self, *words):
        """What a report is as CSV."""
        return list(csv.reader(io.StringIO(self.good(
            'report', '--csv', *words))))

    def live(self, days=(1, 3, 6)):
        """Some days of one who pays, with a refund; the Host."""
        self.good('bill')
        self.credit('5', '--key', 'gift')
        self.good('pay', 'add', 'joe', '25.5', '--by', 'bank', '--reference',
                  'R17')
        host = self.host()
        host.backup(self.client(host, R, W), 'a', 4, 100000)
        for day in days:
            self.at(day)
            self.good('bill')
        return host

    def spent(self, host, day):
        return sum(self.usage(host, day)[1])

    def test_a_month_adds_up(self):
        host = self.live()
        self.at(6)
        self.good('pay', 'refund', 'joe', 'bank-R17', '1.1')
        self.good('user', 'debit', 'joe', '40', '--reason', 'mistake')
        november = self.report()
        days = [self.usage(host, day)[0] for day in range(5)]
        spent = sum(self.spent(host, day) for day in range(5))
        self.assertEqual(
            [november[name] for name in ('first_day', 'last_day', 'days',
                                         'charged', 'closed')],
            [START, '2026-11-30', 5, True, True])
        row, = november['accounts']
        self.assertEqual(row, {
            'account': self.show()['account'], 'user': 'joe', 'machines': 1,
            'bytes_average': sum(day.stored for day in days) // 5,
            'bytes_end': days[4].bytes, 'bytes_up': days[0].up,
            'bytes_down': 0, 'opening': money_text(0),
            'storage': money_text(sum(day.stored for day in days) * 8333333),
            'upload': money_text(days[0].up * 250 * 10 ** 6),
            'download': money_text(0), 'payments': money_text(51 * ATTO // 2),
            'refunds': money_text(0), 'chargebacks': money_text(0),
            'reversals': money_text(0),
            'credits': money_text(5 * ATTO), 'adjustments': money_text(0),
            'closing': money_text(61 * ATTO // 2 - spent)})
        december = self.report('2026-12')
        self.assertEqual((december['days'], december['closed']), (1, False))
        totals = december['totals']
        owes = 10 * ATTO + 6 * ATTO // 10 + spent + self.spent(host, 5)
        self.assertEqual(
            {name: totals[name] for name in (
                'opening', 'closing', 'received', 'adjustments', 'unpaid',
                'prepaid', 'revenue')},
            {'opening': row['closing'], 'closing': money_text(-owes),
             'received': money_text(-11 * ATTO // 10),
             'adjustments': money_text(-40 * ATTO),
             'unpaid': money_text(owes), 'prepaid': money_text(0),
             'revenue': money_text(self.spent(host, 5))})
        text = self.good('report', '--month', '2026-12')
        self.assertIn('\nunpaid $10.60 %s\n' % money_text(owes), text)
        self.assertIn('-$10.61  joe\n', text)

    def test_a_statement_has_every_line(self):
        host = self.live()
        self.at(5)
        machine = '%016x' % host.machine
        head, *rows = self.rows('--account', 'joe')
        self.assertEqual(','.join(head), 'RECTYPE,DATE,MACHINE,TYPE,QUANTITY,'
                                         'AMOUNT,BALANCE,REFERENCE')
        day, (storage, up, _) = self.usage(host, 0)
        self.assertEqual(rows[:7], [
            ['Balance', '2026-10-31', '', '', '', '', money_text(0), ''],
            ['Balance', START, '', '', '', '',
             money_text(61 * ATTO // 2 - storage - up), ''],
            ['Payment', START, '', 'credit', '', money_text(5 * ATTO), '',
             'gift'],
            ['Payment', START, '', 'payment', '', money_text(51 * ATTO // 2),
             '', 'bank-R17'],
            ['Usage', START, machine, 'Daily storage', str(day.stored),
             money_text(storage), '', ''],
            ['Usage', START, machine, 'Client->Server bandwidth',
             str(day.up), money_text(up), '', ''],
            ['Balance', '2026-11-27', '', '', '', '', money_text(
                61 * ATTO // 2 - storage - up - self.spent(host, 1)), '']])
        self.assertEqual(rows[-2][:2], ['Balance', '2026-11-30'])
        found = json.loads(self.good('report', '--account', 'joe', '--json'))
        self.assertEqual(found['closing'], rows[-2][6])
        text = self.good('report', '--account', self.show()['account'])
        for line in found['lines']:
            self.assertIn(line['amount'], text)
        self.assertRegex(text, 'bank-R17 +payment +25.50+ +30.50+\n')
        self.assertRegex(text, 'gift +credit .* welcome\n')
        self.assertRegex(text, 'closing balance +%s\n' % found['closing'])

    def test_bills_that_are_late(self):
        """What is not closed yet is made from what is there."""
        host = self.live((1, 30, 36))
        self.at(66)
        server = self.server()
        for key in server.accounts.list('closed/'):
            server.accounts.delete(key)
        found = self.report('2026-12')
        self.assertEqual((found['days'], found['closed']), (31, False))
        self.assertEqual(found['totals']['opening'], money_text(
            61 * ATTO // 2 - sum(self.spent(host, day) for day in range(5))))
        january = self.report('2027-01')
        self.assertEqual(january['totals']['opening'],
                         found['totals']['closing'])
        self.assertEqual((january['days'], january['last_day']),
                         (30, '2027-01-30'))

    def test_a_closing_that_says_otherwise(self):
        self.live()
        self.at(5)
        server, ident = self.server(), self.show()['account']
        key = 'closed/2026-11/' + ident[0]
        lines = tarsnapd.lines_decode(key, server.accounts.get(key))
        lines[0][1] = str(int(lines[0][1]) + 1)
        server.accounts.delete(key)
        server.accounts.put(key, tarsnapd.lines_encode(key, lines))
        for more in ((), ('--account', 'joe')):
            status, _, err = here('report', self.path, *more)
            self.assertEqual((status, err.count('\n')), (2, 1))
            self.assertIn('%s: %s has 30.' % (key, ident), err)

    def test_names_that_would_be_formulas(self):
        """No cell of somebody else's choice begins as one."""
        server = self.server()
        names = ['=1+1', '+1', '-1', '@SUM(A1)', ' =1', '\uff1d1',
                 'a,"b', "o'hara", 'eve@example.org']
        for name in names:
            server.run(tarsnapd.account_create(name, b'pw'))
        self.good('user', 'credit', '=1+1', '5', '--reason', '=2',
                  '--key', '-1')
        self.at(5)
        users = {row[1] for row in self.rows()[1:]}
        self.assertEqual(users, {"'" + name for name in names[:6]}.union(
            names[6:], ['joe']))
        row = self.rows('--account', '=1+1', '--month', '2026-11')[3]
        self.assertEqual(row[7], "'-1")

    def test_machines_that_change_hands_or_are_nobodys(self):
        self.good('bill')
        self.credit()
        host, stray = self.host(), Host(self.client())
        self.server().run(tarsnapd.account_create('ann', b'pw'))
        for one in host, stray:
            one.backup(self.client(one, R, W), 'a')
        self.at(2)
        self.good('user', 'move-machine', '%016x' % host.machine, 'ann')
        self.at(5)
        self.good('bill')
        found = self.report()
        self.assertEqual(
            [(row['user'], row['machines'], row['bytes_end'] > 0)
             for row in found['accounts']],
            [('-', 1, True), ('ann', 1, True), ('joe', 1, False)])
        self.assertEqual([found['totals'][name] for name in
                          ('accounts', 'machines')], [2, 2])
        self.assertEqual(found['accounts'][0]['closing'], money_text(0))

    def test_wrong_words(self):
        for says, words in (
                ('not a month', ('--month', 'may')),
                ('not a month', ('--month', '2026-11-26')),
                ('has not begun', ('--month', '2026-12')),
                ('not both', ('--json', '--csv')),
                ('does not exist', ('--account', 'eve')),
                ('unknown option', ('--year', '2026'))):
            with self.subTest(words):
                self.wrong(says, 'report', *words)

    def test_nobody_waits_for_it(self):
        """A report stops anywhere; a backup and a bill go on to their end."""
        host = self.live()
        self.good('pay', 'add', 'joe', '1', '--by', 'cash', '--reference',
                  '1')
        month, asked = day_parse('2026-11-01'), set()
        done = self.server().run(tarsnapd.month_report(month))
        reader, steps, wish = (
            self.server(), tarsnapd.month_report(month), None)
        for stop in range(3):
            wish = wish or next(steps)
            for _ in range(7):
                asked.add(wish[0])
                wish = steps.send(reader.perform(wish))
            client = self.client(host, R, W)
            host.begin(client, os.urandom(16))
            client.close()
            self.at(7 + stop)
            self.assertIn('2026-12-0%d: ' % (2 + stop), self.good('bill'))

        with self.assertRaises(StopIteration) as end:
            while True:
                asked.add(wish[0])
                wish = steps.send(reader.perform(wish))
        self.assertEqual(end.exception.value, done)
        self.assertLessEqual(asked, {'get', 'list', 'all', 'now'})

    def test_it_waits_for_nobody(self):
        """Not for whoever has the view or an index."""
        self.live()
        before = self.good('report')
        for name in [os.path.join(self.path, 'ledger.db')] + [
                os.path.join(root, name) for root, _, names
                in os.walk(os.path.join(self.path, 'index'))
                for name in names if name.endswith('.db')]:
            db = sqlite3.connect(name, isolation_level=None)
            self.addCleanup(db.close)
            db.execute('BEGIN EXCLUSIVE')
        self.assertEqual(self.good('report'), before)


class NothingCharged(Clocked):

    PRICES = ''

    def test_usage_is_from_the_logs(self):
        """As a ledger would have it, but for what was sent."""
        host = self.host()
        one = self.client(host, R, W, D)
        host.backup(one, 'a', 4, 100000)
        self.at(2, 18)
        host.backup(one, 'b', 4, 50000)
        self.at(6)
        server = self.server()
        server.run(tarsnapd.start_make(day_parse(START)))
        server.run(tarsnapd.bill(tarsnapd.Prices(1, 1, 1)))
        days = [self.usage(host, day)[0] for day in range(6)]
        for place in ('ledger/', 'usage/', 'closed/'):
            for key in server.accounts.list(place):
                server.accounts.delete(key)
        self.at(5)
        found = json.loads(self.good('report', '--json'))
        row, = found['accounts']
        self.assertEqual(
            (found['charged'], found['days'], row['machines']),
            (False, 30, 1))
        self.assertEqual(
            [row['bytes_' + name] for name in ('average', 'end', 'up')],
            [sum(day.stored for day in days[:5]) // 30, days[4].bytes,
             days[0].up + days[2].up])
        text = self.good('report')
        self.assertIn('nothing was charged', text)
        self.assertNotIn('$', text)
        lines = json.loads(self.good('report', '--json', '--account', 'joe'))[
            'lines']
        self.assertEqual(
            [line['quantity'] for line in lines
             if line['kind'] == 'Daily storage'],
            [day.stored for day in days[:5]])
        self.assertNotIn('balance', self.good('report', '--account', 'joe'))

    def test_nothing_yet(self):
        self.now = day_parse('2026-12-01') * DAY + 60
        self.assertIn('days 0: none', self.good('report', '--month',
                                                '2026-12'))
        self.assertEqual(self.good(
            'report', '--month', '2026-12', '--account', 'joe')
            .splitlines()[1:], [
                'month 2026-12', 'days 0: none that is over was counted yet'])
        self.good('report', '--month', '2026-12', '--csv')


del Clocked


if __name__ == '__main__':
    unittest.main()
