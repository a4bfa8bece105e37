# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap-ledger(5) is true: its examples, and a ledger read by it alone."""

import collections
import hashlib
import json
import os
import re
import unittest

import format_examples
import tarsnapd
from rawclient import R, W
from tarsnapd import day_parse, money_text
from test_ledger import Clocked

PAGE = os.path.join(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))), 'man', 'tarsnap-ledger.5')
MONTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def digest(key, data):
    return hashlib.sha256(key.encode() + b'\n' + data).hexdigest()


class Reader:
    """Reads a ledger, {key: data}, by the page; shares nothing with the
    program.  AssertionError if it is not as the page says.
    """

    def __init__(self, objects):
        self.amounts = collections.defaultdict(list)    # account: (day, n)
        self.entries = collections.defaultdict(dict)    # account: key: JSON
        self.closed = {}                    # month: {account: words}
        for key, data in sorted(objects.items()):
            place, _, rest = key.partition('/')
            if place in ('pay', 'adjust'):
                self.entries[rest.split('/')[0]][key] = self.json(key, data)
            elif place == 'usage':
                self.usage(rest, self.lines(key, data))
            elif place == 'closed':
                month = self.closed.setdefault(rest[:7], {})
                month.update((line[0], line[1:])
                             for line in self.lines(key, data))

    def lines(self, key, data):
        *lines, last = data.decode('ascii').splitlines(True)
        assert last == 'sum %s\n' % digest(key, ''.join(lines).encode()), key
        assert lines == sorted(lines) or key.startswith(('usage', 'traffic'))
        return [line.rstrip('\n').split(' ') for line in lines]

    def json(self, key, data):
        value = json.loads(data)
        rest = {name: x for name, x in value.items() if name != 'sum'}
        assert value['sum'] == digest(key, json.dumps(
            rest, sort_keys=True, separators=(', ', ': ')).encode()), key
        assert data.decode() == json.dumps(value, indent=1,
                                           sort_keys=True) + '\n', key
        return value

    def usage(self, name, lines):
        day, shard = name.split('/')
        assert lines[0] == ['tarsnap-usage', '1'], name
        assert lines[1][0] == 'prices', name
        prices = [int(word) for word in lines[1][1:]]
        year, month, _ = map(int, day.split('-'))
        length = MONTHS[month - 1] + (month == 2 and year % 4 == 0)
        assert prices[0] == 250 * 10 ** 6 // length, name
        for line in lines[2:]:
            if line[0] == 'traffic':
                continue
            assert line[0][0] == shard, name
            amount = sum(map(lambda a, b: a * int(b), prices, line[4:7]))
            assert int(line[7]) == (amount if line[1] != '-' else 0), name
            self.amounts[line[1]].append((day, amount))

    def balance(self, account):
        """From the beginning."""
        return (sum(entry['amount']
                    for entry in self.entries[account].values())
                - sum(amount for _, amount in self.amounts[account]))

    def balance_since(self, account, month):
        """The same with the closing of a month."""
        balance, *known = self.closed[month].get(account, ['0'])
        return (int(balance)
                + sum(entry['amount'] for key, entry
                      in self.entries[account].items() if hashlib.sha256(
                          key.encode()).hexdigest()[:16] not in known)
                - sum(amount for day, amount in self.amounts[account]
                      if day[:7] > month))


class Examples(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        displays = format_examples.blocks(PAGE)
        with open(PAGE) as file:
            cls.text = file.read()
        keys = re.findall(r'(?m)^\.Pa (\S+/\S+) [:,].*\n(?:.*\n)??'
                          r'\.\\" example (\w+)$', cls.text)
        cls.objects = {key: displays['example', name].encode()
                       for key, name in keys}

    def test_they_are_read_by_the_page(self):
        self.assertEqual(len(self.objects), 3)
        reader, account = Reader(self.objects), '5f0c3a9be1d20746'
        self.assertEqual(money_text(5 * tarsnapd.ATTO - reader.balance(
            account)), '0.002094260837459568')
        self.assertEqual(reader.balance_since(account, '2020-05'),
                         reader.balance(account))
        self.assertEqual(reader.closed['2020-05'][account][0],
                         str(reader.balance(account)))

    def test_they_are_what_the_program_writes(self):
        for key, data in self.objects.items():
            place, *rest = key.split('/')
            with self.subTest(key):
                if place == 'usage':
                    usage = tarsnapd.usage_decode(day_parse(rest[0]),
                                                  rest[1], data)
                    self.assertEqual((usage.key(), usage.encode()),
                                     (key, data))
                elif place == 'pay':
                    value = tarsnapd.versioned_decode(key, data)
                    self.assertEqual(tarsnapd.versioned_encode(key, value),
                                     data)
                    self.assertEqual(tarsnapd.money_decode(key, data).kind,
                                     'payment')
                else:
                    lines = tarsnapd.lines_decode(key, data)
                    self.assertEqual(tarsnapd.lines_encode(key, lines), data)

    def test_prices_and_kinds(self):
        row = re.search('(?m)^attodollars for a day (.*)$', self.text)[1]
        self.assertEqual([int(word) for word in row.split()], [
            tarsnapd.price_of_day(250 * 10 ** 6, day_parse(day)) for day in (
                '2021-02-01', '2020-02-01', '2020-04-01', '2020-05-01')])
        for kind in (*tarsnapd.PAID, *tarsnapd.ADJUSTED):
            self.assertRegex(self.text, r'(?m)^\.Ql .*\b%s\b' % kind)
        self.assertIn('259688348 bytes on 2020-05-07', self.text)


class Ledger(Clocked):

    def test_one_is_read_by_the_page_alone(self):
        """Every figure, over the end of a month."""
        self.good('bill')
        self.credit('5')
        host = self.host()
        host.backup(self.client(host, R, W), 'a', 4, 100000)
        server = self.server()
        server.traffic.add(host.machine, 12345)
        server.run(tarsnapd.traffic_flush(server.traffic))
        self.good('pay', 'add', 'joe', '3', '--by', 'cash', '--reference',
                  '7')
        self.at(6)
        self.good('bill')
        self.good('pay', 'refund', 'joe', 'cash-7', '1')
        self.at(9)
        self.good('bill')
        reader = Reader({key: server.accounts.get(key)
                         for key in server.accounts.list('')})
        account = self.show()['account']
        self.assertEqual(len(reader.amounts[account]), 9)
        self.assertEqual(self.show()['balance'],
                         money_text(reader.balance(account)))
        self.assertEqual(list(reader.closed), ['2026-11'])
        self.assertEqual(reader.balance_since(account, '2026-11'),
                         reader.balance(account))


del Clocked


if __name__ == '__main__':
    unittest.main()
