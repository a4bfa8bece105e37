#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Each step of a balance is mailed once, with its dates and amounts."""

import json
import unittest

import tarsnapd
from rawclient import Host, R, W
from tarsnapd import ATTO, money_text
from test_ledger import Clocked


class Notices(Clocked):

    def setUp(self):
        super().setUp()
        self.conf('mail-from = Backups <b@example.org>\n')
        self.good('user', 'address', 'joe', 'zoe@example.org')
        self.ident = self.server().run(tarsnapd.account_need(
            'zoe@example.org'))[1]['id']

    def credit(self, dollars, *more):
        return self.good('user', 'credit', 'zoe@example.org', dollars,
                         '--reason', 'bank 7', *more)

    def sent(self):
        """[(kind, text)] of mails that are due, which are then sent."""
        server, found = self.server(), []
        for name, mail, done in server.run(tarsnapd.mail_list()):
            if not done:
                found.append((mail['kind'], tarsnapd.mail_render(
                    server.post, self.path, name, mail).get_content()
                    .replace('\r', '')))
                self.assertEqual(mail['to'], 'zoe@example.org')
                server.run(tarsnapd.mail_end(name, mail))
        return sorted(found)

    def foreseen(self):
        """Kinds of mails that a dry run says would be sent."""
        lines = self.good('bill', '--dry-run').splitlines()
        return sorted(line.rpartition(' ')[2] for line in lines
                      if line.startswith('zoe@example.org would get the mail'))

    def stored(self):
        """A machine of hers that has a few blocks; what they cost a day."""
        host = Host(self.client())
        server = self.server()
        server.run(tarsnapd.owner_set(host.machine, self.ident))
        self.credit('1')
        host.backup(self.client(host, R, W), 'a', 4, 200000)
        self.at(1)
        self.good('bill')
        return self.usage(host, 0)[0].bytes * 8333333

    def balance(self):
        server = self.server()
        server.run(tarsnapd.ledger_catch_up(self.ident))
        return server.perform(('view', 'balance', self.ident)).money

    def test_down_and_up(self):
        self.good('bill')
        self.assertEqual(self.sent(), [])       # nothing stored, no warning
        daily = self.stored()
        kinds = [kind for kind, _ in self.sent()]
        self.assertEqual(kinds, ['receipt'])
        self.good('user', 'debit', 'zoe@example.org', money_text(
            self.balance() - 8 * daily), '--reason', 'test')
        seen = {}
        for day in range(2, 22):
            self.at(day)
            foreseen = self.foreseen()
            for _ in range(2):                  # however often it is run
                self.good('bill')
            self.assertEqual(self.foreseen(), [])
            sent = self.sent()
            self.assertEqual([kind for kind, _ in sent], foreseen)
            for kind, text in sent:
                self.assertNotIn(kind, seen)
                seen[kind] = (day, text)
        self.assertEqual(list(seen), ['warned', 'negative', 'deletable'])
        day, text = seen['warned']
        self.assertIn('for 6 days, until 2026-12-%02d.' % (day - 4 + 6),
                      text)
        self.assertIn('zoe@example.org was $0.00 on', text)
        day, text = seen['negative']
        self.assertIn('below zero since\n2026-12-%02d;' % (day - 4), text)
        self.assertIn('it was -$0.01.', text)
        self.assertIn('From 2026-12-%02d on' % (day + 3), text)
        self.assertEqual(seen['deletable'][0], day + 7)
        self.credit('1')
        kinds, texts = zip(*self.sent())
        self.assertEqual(kinds, ('receipt', 'reinstated'))
        self.assertIn('received $1.00 for the account zoe@example.org,\n'
                      'reference bank 7.', texts[0])
        self.assertIn('is $0.99.', texts[1])
        self.good('bill')
        self.assertEqual(self.sent(), [])

    def test_killed_before_the_mail(self):
        """Whoever made the step and died: the next one tells of it."""
        self.good('bill')
        daily = self.stored()
        self.sent()
        server = self.server()
        balance = tarsnapd.Balance(2 * daily, daily // 8333333)
        steps = tarsnapd.standing_update(
            {self.ident: balance}, server.prices, False, server.post)
        value = None
        while True:
            wish = steps.send(value)
            value = server.perform(wish)
            if wish[0] == 'put' and wish[1].startswith('standing/'):
                break
        steps.close()
        self.assertEqual(self.sent(), [])
        for _ in range(2):
            self.assertEqual(server.run(tarsnapd.standing_update(
                {self.ident: balance}, server.prices, False, server.post)),
                [])
        self.assertEqual([kind for kind, _ in self.sent()], ['warned'])

    def test_a_payment_has_one_receipt(self):
        self.good('bill')
        server = self.server()
        for _ in range(3):
            server.run(tarsnapd.ledger_pay(
                self.ident, 'stripe', 'cs_1', 5 * ATTO, post=server.post))
        (kind, text), = self.sent()
        self.assertEqual(kind, 'receipt')
        self.assertIn('$5.00', text)
        server.run(tarsnapd.ledger_pay(
            self.ident, 'stripe', 'cs_1', 5 * ATTO, post=server.post))
        server.run(tarsnapd.ledger_pay(
            self.ident, 'stripe', 're_1', -ATTO, 'refund', post=server.post))
        self.assertEqual(self.sent(), [])

    def test_cents(self):
        for amount, text in ((0, '$0.00'), (ATTO, '$1.00'), (-1, '-$0.01'),
                             (ATTO // 1000, '$0.00'),
                             (-ATTO * 3 // 2, '-$1.50'),
                             (12345 * ATTO + 1, '$12345.00')):
            self.assertEqual(tarsnapd.money_short(amount), text)

    def test_export(self):
        self.good('bill')
        self.stored()
        found = json.loads(self.good('user', 'export', 'zoe@example.org'))
        self.assertEqual([(x['kind'], x['amount'], x['text'])
                          for x in found['money']],
                         [('credit', ATTO, 'bank 7')])
        row, = found['usage']
        self.assertEqual(row['day'], '2026-11-26')
        self.assertEqual(ATTO - row['amount'], self.balance())
        self.assertEqual(found['standing'][-1]['state'], 'ok')


del Clocked

if __name__ == '__main__':
    unittest.main()
