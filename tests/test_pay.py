# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Payments that an operator enters by hand count once and go back once."""

import json
import unittest

import rawclient
import tarsnapd
from rawclient import here
from test_ledger import Clocked


class ByHand(Clocked):

    def add(self, dollars='25', reference='R17', *more, name='joe'):
        return self.good('pay', 'add', name, dollars, '--by', 'bank',
                         '--reference', reference, *more)

    def refund(self, *words):
        return self.good('pay', 'refund', 'joe', *words)

    def twice(self, *words):
        """What a command prints that was entered before."""
        self.now += 1
        status, out, err = here('pay', self.path, *words)
        self.assertEqual(status, 0)
        self.assertIn('was entered before; nothing was changed', err)
        return out

    def test_a_payment_counts_once(self):
        self.assertEqual(self.add('25.50', 'R17', '--currency', 'USD'),
                         'balance 25.500000000000000000\n')
        self.assertEqual(
            self.twice('add', 'joe', '25.5', '--by', 'bank', '--reference',
                       'R17', '--text', 'another text'),
            'balance 25.500000000000000000\n')
        self.wrong('bank-R17 is entered already: payment 25.5', 'pay', 'add',
                   'joe', '26', '--by', 'bank', '--reference', 'R17')
        # The same number elsewhere is another payment.
        self.good('pay', 'add', 'joe', '1', '--by', 'cash', '--reference',
                  'R17')
        self.assertEqual(self.show()['balance'], '26.500000000000000000')
        # One payment is not of two accounts.
        rawclient.run('user', self.path, 'add', 'ann', stdin=b'pw\n')
        self.wrong('bank-R17 is a payment of joe already', 'pay', 'add',
                   'ann', '25.50', '--by', 'bank', '--reference', 'R17')

    def test_access_is_back_and_the_owner_has_a_receipt(self):
        self.conf('mail-from = Backups <ledger@example.org>\n')
        rawclient.run('user', self.path, 'add', 'ann@example.org',
                      stdin=b'pw\n')
        self.add(name='ann@example.org')
        self.assertIn('standing ok', self.good('user', 'show',
                                               'ann@example.org'))
        self.assertIn('receipt ann@example.org due', self.good('mail',
                                                               '--list'))

    def test_what_goes_back_is_of_a_payment(self):
        self.add('25')
        self.assertEqual(self.refund('bank-R17', '5'),
                         'refund 5.000000000000000000\n'
                         'balance 20.000000000000000000\n')
        self.twice('refund', 'joe', 'bank-R17', '5')
        self.wrong('is entered already: refund -5.0', 'pay', 'refund', 'joe',
                   'bank-R17', '6')
        self.wrong('5.000000000000000000 of 25.000000000000000000 dollars '
                   'were given back; not 20.01', 'pay', 'refund', 'joe',
                   'bank-R17', '20.01', '--reference', 'B2')
        self.refund('bank-R17', '4', '--reference', 'B2')
        self.assertEqual(self.refund('bank-R17', '--chargeback'),
                         'chargeback 16.000000000000000000\n'
                         'balance 0.000000000000000000\n')
        self.twice('refund', 'joe', 'bank-R17', '--chargeback')
        self.wrong('not 0.0', 'pay', 'refund', 'joe', 'bank-R17',
                   '--reference', 'B3')

    def test_what_a_provider_tells_is_not_entered_by_hand_too(self):
        self.good('pay', 'add', 'joe', '25', '--by', 'stripe', '--reference',
                  'cs_1')
        self.wrong('give it back at Stripe', 'pay', 'refund', 'joe',
                   'stripe-cs_1')
        self.refund('stripe-cs_1', '--reference', 're_1')
        server = self.server()
        self.now += 1
        self.assertFalse(server.run(tarsnapd.ledger_pay(
            self.show()['account'], 'stripe', 're_1', -25 * tarsnapd.ATTO,
            'refund', of='stripe-cs_1')))

    def test_list(self):
        self.assertEqual(self.good('pay', 'list'), '')
        self.add('25', 'R17', '--text', 'A\x1b[m')
        self.at(1)
        self.refund('bank-R17', '0.01', '--text', 'rounding')
        self.assertEqual(
            self.good('pay', 'list', 'joe'),
            '2026-11-26 08:00:00Z joe payment bank-R17 25.' + 18 * '0'
            + ' A?[m\n2026-11-27 08:00:00Z joe refund bank-R17.refund '
            '-0.01' + 16 * '0' + ' of bank-R17 rounding\n')
        rows = json.loads(self.good('pay', 'list', '--json'))
        self.assertEqual([row['of'] for row in rows], ['', 'bank-R17'])
        self.assertEqual(rows[0]['text'], 'A?[m')

    def test_an_account_that_was_closed(self):
        """It is named by its id."""
        self.add()
        ident = self.show()['account']
        self.good('user', 'close', 'joe')
        self.wrong('does not exist', 'pay', 'refund', 'joe', 'bank-R17')
        self.assertIn('balance 0.0', self.good('pay', 'refund', ident,
                                               'bank-R17'))
        self.wrong('does not exist', 'pay', 'list', 16 * '0')

    def test_wrong_words(self):
        by = ('--by', 'bank', '--reference', 'R1')
        for says, words in (
                ('see --help', ('give', 'joe')),
                ('see --help', ('add', 'joe', *by)),
                ('see --help', ('add', 'joe', '5', *by, '--chargeback')),
                ('see --help', ('list', '--text', 'x')),
                ('--by PROVIDER', ('add', 'joe', '5', '--by', 'bank')),
                ('small letters', ('add', 'joe', '5', '--by', 'my-bank',
                                   '--reference', 'R1')),
                ('small letters', ('add', 'joe', '5', '--by', 'Bank',
                                   '--reference', 'R1')),
                ('1 to 200 letters', ('add', 'joe', '5', '--by', 'bank',
                                      '--reference', '../R1')),
                ('US dollars', ('add', 'joe', '5', *by, '--currency',
                                'EUR')),
                ('not an amount', ('add', 'joe', '5.001', *by)),
                ('not an amount', ('add', 'joe', '-5', *by)),
                ('more than nothing', ('add', 'joe', '0.00', *by)),
                ('does not exist', ('add', 'eve', '5', *by)),
                ('no payment', ('refund', 'joe', 'bank-R1')),
                ('no payment', ('refund', 'joe', 'bank-\x1b'))):
            with self.subTest(words):
                self.wrong(says, 'pay', *words)
        self.assertEqual(self.good('pay', 'list'), '')


class NoPrices(Clocked):

    PRICES = ''

    def test_money_may_come_before_prices_do(self):
        self.assertEqual(self.good('pay', 'add', 'joe', '25', '--by', 'cash',
                                   '--reference', '1'), '')
        self.assertEqual(self.good('pay', 'refund', 'joe', 'cash-1'),
                         'refund 25.000000000000000000\n')


del Clocked


if __name__ == '__main__':
    unittest.main()
