# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Payments through Stripe and PayPal: who was charged has it in the ledger,
once, whatever is lost, late, twice, forged or killed on the way.
"""

import contextlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import faults
import paypeer
import rawclient
import tarsnapd
from rawclient import here
from tarsnapd import ATTO, DAY, Outcome, ProviderError, ServerError
from world import seed_choose


class Killed(BaseException):
    """What no process survives."""


class Killing(tarsnapd.Server):
    """A server whose process dies before a wish, or what is the same, after
    the one before it.
    """

    wishes, at = 0, 0
    ahead = 0                       # seconds, of its clock

    def perform(self, wish):
        if wish[0] not in ('now', 'random', 'all'):
            self.wishes += 1
            if self.wishes == self.at:
                raise Killed
        return super().perform(wish)

    def perform_here(self, wish):
        if wish[0] == 'now':
            return int(time.time()) + self.ahead
        return super().perform_here(wish)


class Case(unittest.TestCase):

    PRICES = ''

    @classmethod
    def setUpClass(cls):
        cls.fake = paypeer.Fake(cls.addClassCleanup)
        cls.path = rawclient.server_directory(cls)
        with open(os.path.join(cls.path, 'tarsnapd.conf'), 'a') as file:
            file.write('web-url = https://backup.example.org/a/account.cgi\n'
                       'pay-keys = pay.keys\n' + cls.PRICES)
        cls.keys()

    @classmethod
    def keys(cls, **values):
        """Write the file of keys."""
        cls.fake.keys(os.path.join(cls.path, 'pay.keys'), **values)

    def setUp(self):
        self.limit('first delay', 0.001)
        self.server = self.open()
        self.clear()

    def limit(self, name, value):
        patch = mock.patch.dict(tarsnapd.PAY_LIMIT, {name: value})
        patch.start()
        self.addCleanup(patch.stop)

    def open(self):
        server = Killing(self.path)
        self.addCleanup(server.close)
        return server

    def clear(self):
        """Nobody has paid anything, and the account is a new one."""
        self.fake.reset()
        for key in self.server.accounts.list('checkout/'):
            self.server.accounts.delete(key)
        self.account = os.urandom(8).hex()
        self.server.ahead = 0

    # What happens to us.

    def begin(self, provider='stripe', dollars=10):
        """(name of a checkout, what the provider calls it)"""
        name, url = self.server.run(tarsnapd.checkout_begin(
            self.server.shop(), provider, self.account, dollars))
        self.assertTrue(url.startswith(self.fake.url))
        return name, url.replace('=', '/').rpartition('/')[2]

    def settle(self, name):
        """The payer is back, or somebody who says so; the Outcome."""
        out = Outcome()
        self.server.run(tarsnapd.checkout_settle(self.server.shop(), out,
                                                 name))
        return out

    def hook(self, event, server=None, **how):
        """A webhook comes; the Outcome."""
        out, server = Outcome(), server or self.server
        server.run(tarsnapd.pay_webhook(
            server.shop(), out,
            'paypal' if 'event_type' in event else 'stripe',
            *self.fake.hook(event, **how)))
        return out

    def reconcile(self, server=None):
        out, server = Outcome(), server or self.server
        server.run(tarsnapd.pay_reconcile(server.shop(), out))
        return out

    # What came of it.

    def entries(self):
        """[(kind, cents)] in the ledger, as they are called."""
        found = self.server.run(tarsnapd.pay_entries(self.account))
        return sorted((money.kind, money.amount * 100 // ATTO)
                      for money in found.values())

    def balance(self):
        return sum(cents for _, cents in self.entries())

    def check(self, *entries):
        """Just these are in the ledger, and what providers say is."""
        self.assertEqual(self.entries(), sorted(entries))
        self.assertEqual(self.balance(),
                         self.fake.charged().get(self.account, 0))

    def due(self):
        return self.server.accounts.list('checkout/due/')


class StripeFlow(Case):

    def test_a_payment(self):
        """By the webhook; what the browser says changes nothing."""
        name, session = self.begin()
        self.assertEqual(self.settle(name).state, 'open')
        self.check()
        event = self.fake.stripe_pay(session)
        out = self.hook(event)
        self.assertEqual((out.state, out.differs), ('paid', []))
        self.check(('payment', 1000))
        self.assertEqual(self.settle(name).did, [])
        self.assertEqual(self.due(), [])
        _, _, headers, form = self.fake.seen[0]
        self.assertEqual(headers['Stripe-Version'], tarsnapd.STRIPE_VERSION)
        self.assertEqual(headers['Idempotency-Key'], name)
        self.assertEqual(form['success_url'], 'https://backup.example.org/a/'
                         'paid.cgi?checkout=' + name)

    def test_what_was_asked_is_durable_before_anybody_is_asked(self):
        self.fake.plan = lambda *_: 'reset'
        with self.assertRaises(ProviderError):
            self.begin()
        due, = self.due()
        name = due.rpartition('/')[2]
        checkout = self.server.run(tarsnapd.checkout_load(name))
        self.assertEqual((checkout.cents, checkout.session), (1000, None))
        # It never was one: it goes after a while, without a word.
        self.assertEqual(self.reconcile().did, [])
        self.server.ahead = 6 * DAY
        self.fake.plan = lambda *_: None
        self.assertEqual(self.reconcile().differs, [])
        self.assertEqual(self.due(), [])

    def test_answer_lost(self):
        """The same request again is the same session, not a second one."""
        for fate in ('lost', 'torn', 'hang', 'reset', 500, 409):
            with self.subTest(fate):
                self.limit('silence', 2 if fate == 'hang' else 60)
                self.clear()
                self.fake.plan = lambda n, *_, fate=fate: (
                    fate if n == 1 else None)
                name, session = self.begin()
                self.hook(self.fake.stripe_pay(session))
                self.check(('payment', 1000))
                self.assertEqual(
                    len(self.fake.under('checkout.session')), 1)

    def test_a_refusal_is_not_repeated(self):
        for fate in (302, 400, 401, 402, 404, 429):
            self.clear()
            self.fake.plan = lambda *_, fate=fate: fate
            with self.assertRaises(ProviderError) as caught:
                self.begin()
            self.assertEqual((self.fake.count, caught.exception.status),
                             (1, fate))

    def test_what_stripe_says_of_repeating_it(self):
        for fate, count in ((500, 3), ((500, 'false'), 1), ((400, 'true'), 3),
                            ((429, 'true'), 3), (503, 3), (409, 3)):
            self.clear()
            self.fake.plan = lambda *_, fate=fate: fate
            with self.assertRaises(ProviderError):
                self.begin()
            self.assertEqual(self.fake.count, count, fate)

    def test_transfer_that_takes_days(self):
        for good in (True, False):
            self.clear()
            name, session = self.begin()
            out = self.hook(self.fake.stripe_pay(session, later=True))
            self.assertEqual(out.state, 'waiting')
            self.server.ahead = 9 * DAY
            self.assertEqual(self.reconcile().did, [])
            self.assertEqual(len(self.due()), 1)
            out = self.hook(self.fake.stripe_arrives(session, good),
                            when=int(time.time()) + 9 * DAY)
            self.assertEqual(out.state, 'paid' if good else 'ended')
            self.check(*[('payment', 1000)][:good])
            self.assertEqual(self.due(), [])

    def test_expired(self):
        name, session = self.begin()
        self.assertEqual(self.hook(self.fake.stripe_expire(session)).state,
                         'ended')
        self.assertEqual((self.due(), self.entries()), ([], []))

    def test_events_late_twice_and_in_another_order(self):
        """In any order it comes to the same."""
        name, session = self.begin()
        events = [self.fake.stripe_pay(session),
                  self.fake.stripe_refund(session, 300),
                  self.fake.stripe_refund(session, 200)]
        events.append(self.fake.stripe_dispute(session, 500))
        events.append(self.fake.stripe_closed(events[-1], 'won'))
        for event in events[::-1] + events:
            self.assertEqual(self.hook(event).differs, [])
        self.check(('payment', 1000), ('refund', -300), ('refund', -200),
                   ('chargeback', -500), ('reversal', 500))

    def test_disputes(self):
        for status, entries in (
                ('warning_needs_response', []), ('prevented', []),
                ('needs_response', [('chargeback', -1000)]),
                ('lost', [('chargeback', -1000)])):
            self.clear()
            name, session = self.begin()
            self.hook(self.fake.stripe_pay(session))
            event = self.fake.stripe_dispute(session, 1000)
            self.hook(self.fake.stripe_closed(event, status))
            self.check(('payment', 1000), *entries)

    def test_refund_that_fails(self):
        name, session = self.begin()
        self.hook(self.fake.stripe_pay(session))
        event = self.fake.stripe_refund(session, 1000)
        self.hook(event)
        self.check(('payment', 1000), ('refund', -1000))
        self.hook(self.fake.stripe_refund_fails(event))
        self.check(('payment', 1000), ('refund', -1000), ('reversal', 1000))

    def test_another_amount_or_currency_is_not_entered(self):
        for values in ({'amount_total': 999}, {'amount_total': 100000},
                       {'currency': 'idr'}):
            self.clear()
            name, session = self.begin()
            out = self.hook(self.fake.stripe_pay(session, **values))
            self.assertEqual(out.state, 'differs')
            self.assertIn('in place of 10.00 USD', out.differs[0])
            self.assertEqual(self.entries(), [])
            # It is said every day until an operator has entered something.
            self.assertEqual(len(self.reconcile().differs), 2)
            self.assertEqual(len(self.due()), 1)

    def test_refund_of_what_was_not_entered_takes_nothing(self):
        name, session = self.begin()
        self.hook(self.fake.stripe_pay(session, amount_total=400))
        out = self.hook(self.fake.stripe_refund(session, 400))
        self.assertIn('was not entered', out.differs[-1])
        self.assertEqual(self.entries(), [])

    def test_what_an_operator_entered_stands(self):
        name, session = self.begin()
        event = self.fake.stripe_pay(session)
        self.server.run(tarsnapd.ledger_pay(
            self.account, 'stripe', session, 7 * ATTO))
        out = self.hook(event)
        self.assertEqual((out.state, out.did), ('paid', []))
        self.assertEqual(self.entries(), [('payment', 700)])

    def test_what_differs_until_an_operator_has_entered_it(self):
        for provider in ('stripe', 'paypal'):
            self.clear()
            name, ident = self.begin(provider)
            if provider == 'stripe':
                self.fake.stripe_pay(ident, amount_total=700)
            else:
                self.fake.amount = {'value': '7.00'}
                self.addCleanup(self.fake.__dict__.pop, 'amount', None)
                self.fake.paypal_approve(ident)
            out = self.settle(name)
            said, = out.differs
            self.server.run(tarsnapd.ledger_pay(
                self.account, provider, re.search(
                    provider + '-([^ ]+) is 7.00 USD', said)[1], 7 * ATTO))
            self.assertEqual(self.settle(name).state, 'paid')
            self.assertEqual((self.due(), self.reconcile().differs),
                             ([], []))
            if provider == 'stripe':
                self.hook(self.fake.stripe_refund(ident, 700))
            else:
                self.hook(self.fake.paypal_refund(ident, '7.00'))
            self.check(('payment', 700), ('refund', -700))

    def test_events_of_something_else(self):
        """The same Stripe account may sell other things."""
        other = self.fake.make(
            'checkout.session', 'cs_', status='complete', metadata={},
            payment_status='paid', payment_intent=None, amount_total=1)
        for event in (
                self.fake.stripe_event('checkout.session.completed', other),
                self.fake.stripe_event('invoice.paid', {'object': 'invoice'}),
                self.fake.stripe_event('charge.refunded', {
                    'object': 'charge', 'payment_intent': self.fake.make(
                        'payment_intent', 'pi_', metadata={})['id']})):
            self.assertEqual(self.hook(event).differs, [])
        self.assertEqual(self.entries(), [])

    def test_a_session_of_another_checkout(self):
        """Only what the provider keeps of a checkout counts for it."""
        name, session = self.begin()
        self.fake.things[session]['metadata'] = {'checkout': 'x'}
        self.fake.stripe_pay(session)
        self.assertEqual(self.settle(name).state, 'differs')
        self.assertEqual(self.entries(), [])


class PayPalFlow(Case):

    def test_a_payment(self):
        name, order = self.begin('paypal')
        self.assertEqual(self.settle(name).state, 'open')
        self.fake.paypal_approve(order)
        out = self.settle(name)
        self.assertEqual((out.state, out.differs), ('paid', []))
        self.check(('payment', 1000))
        for event in self.fake.events['paypal']:
            self.assertEqual(self.hook(event).did, [])
        self.assertEqual(self.due(), [])
        tokens = sum(path == '/v1/oauth2/token' for path in self.paths())
        self.assertLessEqual(tokens, 1)

    def paths(self):
        return [path for _, path, _, _ in self.fake.seen]

    def test_the_payer_never_comes_back(self):
        """His approval is told by a webhook, or found by reconcile."""
        for how in ('hook', 'reconcile'):
            self.clear()
            name, order = self.begin('paypal')
            event = self.fake.paypal_approve(order)
            if how == 'hook':
                self.hook(event)
            else:
                self.reconcile()
            self.check(('payment', 1000))

    def test_capture_of_which_the_answer_is_lost(self):
        for fate in ('lost', 'torn', 'hang', 'reset', 500):
            with self.subTest(fate):
                self.limit('silence', 2 if fate == 'hang' else 60)
                self.clear()
                name, order = self.begin('paypal')
                self.fake.paypal_approve(order)
                seen = []

                def plan(n, method, path, seen=seen, fate=fate):
                    if path.endswith('/capture'):
                        seen.append(path)
                        return fate if len(seen) == 1 else None
                    return None
                self.fake.plan = plan
                self.assertEqual(self.settle(name).state, 'paid')
                self.assertEqual(len(seen), 2)
                self.check(('payment', 1000))

    def test_card_declined_then_another(self):
        name, order = self.begin('paypal')
        self.fake.funds = False
        self.fake.paypal_approve(order)
        self.assertEqual(self.settle(name).state, 'open')
        self.fake.funds = True
        self.fake.paypal_approve(order)
        self.assertEqual(self.settle(name).state, 'paid')
        self.check(('payment', 1000))

    def test_pending(self):
        name, order = self.begin('paypal')
        self.fake.captured = 'PENDING'
        self.addCleanup(self.fake.__dict__.pop, 'captured', None)
        self.fake.paypal_approve(order)
        self.assertEqual(self.settle(name).state, 'waiting')
        self.check()
        self.hook(self.fake.paypal_arrives(order))
        self.check(('payment', 1000))

    def test_another_amount_or_currency_is_not_entered(self):
        self.addCleanup(self.fake.__dict__.pop, 'amount', None)
        for values in ({'value': '9.99'}, {'currency_code': 'MXN'}):
            self.clear()
            self.fake.amount = values
            name, order = self.begin('paypal')
            self.fake.paypal_approve(order)
            out = self.settle(name)
            self.assertEqual((out.state, self.entries()), ('differs', []))

    def test_events_late_twice_and_in_another_order(self):
        name, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.settle(name)
        self.fake.paypal_refund(order, '2.50')
        self.fake.paypal_refund(order, '7.50', 'REVERSED', listed=False)
        self.fake.paypal_dispute(order, 'RESOLVED_SELLER_FAVOUR')
        events = list(self.fake.events['paypal'])
        for event in events[::-1] + events:
            self.assertEqual(self.hook(event).differs, [])
        self.assertEqual(self.entries(), sorted([
            ('payment', 1000), ('refund', -250), ('chargeback', -750),
            ('reversal', 750)]))

    def test_dispute_that_the_buyer_wins(self):
        name, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.settle(name)
        self.hook(self.fake.paypal_dispute(order, 'RESOLVED_BUYER_FAVOUR'))
        self.hook(self.fake.paypal_refund(order, '10.00', 'REVERSED'))
        # Also the order lists it: it is the same.
        self.check(('payment', 1000), ('chargeback', -1000)) if (
            'chargeback', -1000) in self.entries() else self.check(
                ('payment', 1000), ('refund', -1000))

    def test_dispute_taken_back_before_the_bank_is_asked(self):
        """The one that the buyer cancelled says nothing of the other."""
        name, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.settle(name)
        self.hook(self.fake.paypal_dispute(order, 'CANCELED_BY_BUYER'))
        second = self.fake.paypal_dispute(order, None)
        self.hook(second)
        taken = self.fake.paypal_refund(order, '10.00', 'REVERSED',
                                        listed=False)
        self.hook(taken)
        books = [('chargeback', -1000), ('payment', 1000)]
        self.assertEqual(self.entries(), books)
        dispute = self.fake.things[second['resource']['id']]
        dispute['dispute_outcome'] = {'outcome_code': 'RESOLVED_BUYER_FAVOUR'}
        for event in (second, taken):
            self.hook(event)
        self.assertEqual(self.entries(), books)
        # Had the bank decided otherwise, it were money again.
        dispute['dispute_outcome'] = {
            'outcome_code': 'RESOLVED_SELLER_FAVOUR'}
        self.hook(second)
        self.assertEqual(self.entries(), books + [('reversal', 1000)])

    WON, LOST = 'RESOLVED_SELLER_FAVOUR', 'RESOLVED_BUYER_FAVOUR'

    def paid(self):
        """An order that was captured."""
        name, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.settle(name)
        return order

    def reversals(self):
        """{name without that of the payment: cents}"""
        found = self.server.run(tarsnapd.pay_entries(self.account))
        paid, = [name for name, money in found.items()
                 if money.kind == 'payment']
        return {name.replace(paid, 'PAID'): money.amount * 100 // ATTO
                for name, money in found.items() if money.kind == 'reversal'}

    def test_two_disputes_of_one_payment(self):
        """What comes back is of the one that was won, whatever comes when."""
        for amounts in (('4.00', '6.00'), ('5.00', '5.00')):
            for order in itertools.permutations(range(4)):
                self.clear()
                paid = self.paid()
                won, lost = (self.fake.paypal_dispute(paid, None, value)
                             ['resource']['id'] for value in amounts)
                happens = [
                    lambda: self.fake.paypal_refund(
                        paid, amounts[0], 'REVERSED', listed=False),
                    lambda: self.fake.paypal_refund(
                        paid, amounts[1], 'REVERSED', listed=False),
                    lambda: self.fake.paypal_resolve(won, self.WON),
                    lambda: self.fake.paypal_resolve(lost, self.LOST)]
                for at in order:
                    self.hook(happens[at]())
                    self.assertLessEqual(sum(self.reversals().values()),
                                         -sum(cents for kind, cents
                                              in self.entries()
                                              if kind == 'chargeback'))
                for event in list(self.fake.events['paypal']):
                    self.assertEqual(self.hook(event).differs, [])
                self.assertEqual(self.reversals(), {
                    'PAID.won.' + won: int(amounts[0][0]) * 100})

    def test_many_disputes(self):
        """Some end before anything was taken; never is more given back than
        was, and in the end just what was won.
        """
        dice = random.Random(seed_choose('disputes'))
        for _ in range(25):
            self.clear()
            paid, left, happens, back = self.paid(), 10, [], 0
            while left and len(happens) < 8:
                value = dice.choice((1, 1, 2, 3))
                won, taken = dice.choice(((1, 1), (1, 1), (1, 0), (0, 1)))
                if taken * value > left:
                    continue
                left -= taken * value
                back += taken * won * value
                text = '%d.00' % value
                ident = self.fake.paypal_dispute(
                    paid, None, text)['resource']['id']
                happens.append((self.fake.paypal_resolve, ident,
                                self.WON if won else self.LOST))
                if taken:
                    happens.append((self.fake.paypal_refund, paid, text,
                                    'REVERSED', False))
            dice.shuffle(happens)
            for act, *args in happens:
                self.hook(act(*args))
                taken = -sum(cents for kind, cents in self.entries()
                             if kind == 'chargeback')
                self.assertLessEqual(sum(self.reversals().values()),
                                     min(taken, 100 * back))
            self.assertEqual(sum(self.reversals().values()), 100 * back)

    def test_a_reversal_of_the_older_name(self):
        """Counts as that of its dispute."""
        for cents in (500, 400):
            self.clear()
            paid = self.paid()
            texts = ['%d.00' % (n // 100) for n in (500, cents)]
            first = self.fake.paypal_dispute(paid, self.WON, texts[0])
            taken = self.fake.paypal_refund(paid, texts[0], 'REVERSED',
                                            listed=False)
            with mock.patch.object(tarsnapd, 'disputes_won', return_value=[]):
                self.hook(taken)
            entries = self.server.run(tarsnapd.pay_entries(self.account))
            (name, money), = [one for one in entries.items()
                              if one[1].kind == 'chargeback']
            provider, _, reference = (name + '.won').partition('-')
            self.assertTrue(self.server.run(tarsnapd.ledger_pay(
                self.account, provider, reference, -money.amount, 'reversal',
                '', None, money.of)))
            self.hook(first)
            self.hook(self.fake.paypal_dispute(paid, self.LOST, texts[1]))
            self.hook(self.fake.paypal_refund(paid, texts[1], 'REVERSED',
                                              listed=False))
            self.hook(first)
            self.assertEqual(list(self.reversals().values()), [500])

    def test_disputes_that_cannot_be_told_apart(self):
        paid = self.paid()
        self.fake.paypal_dispute(paid, self.WON)
        self.fake.paypal_dispute(paid, self.LOST)
        out = self.hook(self.fake.paypal_refund(paid, '4.00', 'REVERSED',
                                                listed=False))
        self.assertIn('what is of which dispute is not clear', out.differs[0])
        self.assertEqual(self.reversals(), {})
        # One of them took more than it was found to have taken.
        self.clear()
        paid = self.paid()
        self.hook(self.fake.paypal_dispute(paid, self.WON))
        for text, differs in (('4.00', 0), ('3.00', 1)):
            out = self.hook(self.fake.paypal_refund(paid, text, 'REVERSED',
                                                    listed=False))
            self.assertEqual(len(out.differs), differs)
        self.assertEqual(list(self.reversals().values()), [400])

    def test_more_than_was_paid_is_not_taken(self):
        name, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.settle(name)
        self.hook(self.fake.paypal_refund(order, '10.00'))
        out = self.hook(self.fake.paypal_refund(order, '10.00', 'REVERSED'))
        self.assertIn('more than is left', out.differs[0])
        self.assertEqual(self.balance(), 0)

    def test_never_approved(self):
        name, order = self.begin('paypal')
        del self.fake.things[order]
        self.assertEqual(self.settle(name).state, 'open')
        self.server.ahead = 6 * DAY
        self.assertEqual(self.settle(name).state, 'ended')
        self.assertEqual(self.due(), [])

    def test_what_a_webhook_says_is_read_again(self):
        """A signed one, too, counts only as PayPal's API gives it."""
        name, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.settle(name)
        capture, = self.fake.under('capture')
        for ident in ('WH-1', self.fake.events['paypal'][-1]['id']):
            out = self.hook({
                'id': ident, 'event_type': 'PAYMENT.CAPTURE.REFUNDED',
                'resource': {
                    'id': 'R1', 'links': [{
                        'rel': 'up', 'href': '/captures/' + capture['id']}],
                    'amount': {'value': '10.00', 'currency_code': 'USD'}}})
            self.assertEqual((out.did, out.differs), ([], []))
        self.check(('payment', 1000))

    def test_token_that_is_not_good_any_more(self):
        self.begin('paypal')
        self.fake.tokens.clear()
        self.begin('paypal')


class Signatures(Case):

    def forged(self, says, headers, body, provider='stripe'):
        with self.assertRaisesRegex(ServerError, says):
            self.server.run(tarsnapd.pay_webhook(
                self.server.shop(), Outcome(), provider, headers, body))
        self.assertEqual(self.entries(), [])

    def test_stripe(self):
        name, session = self.begin()
        event = self.fake.stripe_pay(session)
        now, bad = int(time.time()), 'without a good signature'
        _, body = self.fake.hook(event)
        sign = paypeer.stripe_signature
        good = sign(body, now, paypeer.SECRET)
        for header in (
                '', 't=,v1=', good.replace('v1', 'v0'), good[:-1],
                good.replace('t=', 't=1'), good + ',t=%d' % now,
                sign(body, now, 'whsec_other'), 'v1=' + good[-64:],
                good.replace('v1=', 'v1=\xe4'), 't=%s,v1=x' % ('9' * 99)):
            self.forged(bad, {'STRIPE-SIGNATURE': header}, body)
        self.forged(bad, {'STRIPE-SIGNATURE': good}, body + b' ')
        self.forged(bad, {}, body)
        self.forged('long ago', *self.fake.hook(event, when=now - 301))
        self.forged('not JSON', {'STRIPE-SIGNATURE': sign(
            b'{', now, paypeer.SECRET)}, b'{')
        # Two secrets while they are exchanged, and several signatures.
        self.hook(event, when=now - 299, secret='whsec_new')
        self.check(('payment', 1000))
        out = Outcome()
        self.server.run(tarsnapd.pay_webhook(
            self.server.shop(), out, 'stripe', {
                'STRIPE-SIGNATURE': good.replace(
                    'v1=', 'v1=%s, v1=' % ('0' * 64))}, body))
        self.assertEqual(out.state, 'paid')

    def test_paypal(self):
        name, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        event = self.fake.events['paypal'][0]
        bad = 'without a good signature'
        headers, body = self.fake.hook(event)
        for change in (
                {'PAYPAL-TRANSMISSION-ID': 'id-2'},
                {'PAYPAL-TRANSMISSION-SIG': 'AAAA'},
                {'PAYPAL-TRANSMISSION-SIG': '='},
                {'PAYPAL-AUTH-ALGO': 'SHA1withRSA'},
                {'PAYPAL-CERT-URL': 'https://evil.example/v1/notifications/'
                 'certs/CERT-1'},
                {'PAYPAL-CERT-URL': self.fake.url + '/v2/CERT-1'},
                {'PAYPAL-CERT-URL': 'file:///v1/notifications/certs/x'}):
            self.forged(bad, dict(headers, **change), body, 'paypal')
        self.forged(bad, {}, body, 'paypal')
        self.forged(bad, headers, body + b' ', 'paypal')
        self.forged(bad, *self.fake.hook(event, webhook='OTHER'), 'paypal')
        out = self.hook(event)
        self.assertEqual(out.state, 'paid')

    def test_whose_certificate(self):
        for name, days, good in (
                ('messageverificationcerts.paypal.com', (-1, 1), True),
                ('messageverificationcerts.paypal.com', (-9, -1), False),
                ('messageverificationcerts.paypal.com', (1, 9), False),
                ('paypal.com.example.org', (-1, 1), False)):
            _, pem = paypeer.paypal_certificate(name, days)
            self.assertEqual(tarsnapd.certificate_key(pem) is not None, good)
        self.assertIsNone(tarsnapd.certificate_key(b'nothing'))


class Limits(Case):

    def test_amounts(self):
        for dollars in (0, 4, 501, -5):
            with self.assertRaisesRegex(ServerError, r'\$5 to \$500'):
                self.begin(dollars=dollars)
        self.assertEqual(self.due(), [])

    def test_the_first_payment_is_a_larger_one(self):
        shop = self.server.shop()
        shop.least = 2
        with self.assertRaisesRegex(ServerError, r'\$5 to'):
            self.begin(dollars=2)
        _, session = self.begin(dollars=5)
        self.hook(self.fake.stripe_pay(session))
        self.begin(dollars=2)

    def test_many_at_once(self):
        for _ in range(tarsnapd.CHECKOUT_MOST):
            self.begin()
        with self.assertRaisesRegex(ServerError, 'too many'):
            self.begin()
        self.account = os.urandom(8).hex()
        self.begin()

    def test_pages_elsewhere(self):
        """No browser is sent where the configuration does not say."""
        self.server.shop().hosts['stripe'] = 'https://checkout.stripe.com'
        with self.assertRaisesRegex(ProviderError, 'which is not'):
            self.begin()

    def test_names_of_checkouts_that_are_none(self):
        for name in ('', 'x', '../' * 5, self.account + '-' + '0' * 24,
                     '%s-%s\n' % (self.account, '0' * 24)):
            self.assertEqual(self.settle(name).state, 'unknown')

    def test_answers_that_make_no_sense(self):
        name, session = self.begin()
        thing = dict(self.fake.things[session])
        for field, value in (
                ('payment_status', None), ('status', 3), ('metadata', []),
                ('metadata', None), ('amount_total', '1000'),
                ('amount_total', True), ('currency', None),
                ('payment_intent', 5)):
            self.fake.things[session] = {
                **thing, 'status': 'complete', 'payment_status': 'unpaid'
                if field == 'payment_intent' else 'paid', field: value}
            if field == 'currency':
                self.server.shop().lax = lambda name: False
            with self.assertRaises(ProviderError, msg=field):
                self.settle(name)
        self.assertEqual(self.entries(), [])

    def test_refunds_of_nothing(self):
        name, session = self.begin()
        self.hook(self.fake.stripe_pay(session))
        for cents in (0, -5):
            with self.assertRaisesRegex(ProviderError, 'of nothing'):
                self.hook(self.fake.stripe_refund(session, cents))
        self.assertEqual(self.entries(), [('payment', 1000)])


class Keys(Case):

    def wrong(self, says, text, mode=0o600):
        file = os.path.join(self.path, 'pay.keys')
        with open(file, 'w') as out:
            out.write(text)
        os.chmod(file, mode)
        status, out, err = here('pay', self.path, 'reconcile')
        self.assertEqual((status, out, err.count('\n')), (1, '', 1), err)
        self.assertIn(says, err)
        # The name of a directory may have that in it.
        self.assertNotIn('sk_', err.replace(self.path, ''))

    def test_files_that_are_refused(self):
        self.addCleanup(self.keys)
        good = '[stripe]\nsecret-key = sk_1\n'
        self.wrong('others can read it', good, 0o640)
        self.wrong('others can read it', good, 0o604)
        self.wrong('unknown price-list', good + 'price-list = x\n')
        self.wrong('unknown amazon', '[amazon]\n')
        self.wrong('[stripe] needs secret-key', '[stripe]\nprice = x\n')
        self.wrong('[paypal] needs client-id and', '[paypal]\napi = x\n')
        self.wrong('MissingSectionHeader', 'secret-key = sk_1\n')
        self.wrong('is not https', good + 'api = http://stripe.example\n')
        self.wrong('is not https', good + 'page = http://stripe.example\n')
        os.unlink(os.path.join(self.path, 'pay.keys'))
        status, _, err = here('pay', self.path, 'reconcile')
        self.assertEqual((status, err.count('\n')), (1, 1))

    def test_the_hosts_of_a_sandbox(self):
        self.addCleanup(self.keys)
        self.keys(paypal=tarsnapd.PAYPAL_SANDBOX + '/')
        file = os.path.join(self.path, 'pay.keys')
        with open(file) as keys:
            text = keys.read()
        text = text.replace('page = %s/\n' % tarsnapd.PAYPAL_SANDBOX, '')
        tarsnapd.write_file(file, text.encode())
        shop = self.open().shop()
        self.assertEqual(shop.pages('paypal'),
                         'https://www.sandbox.paypal.com')
        self.assertEqual(shop.trials, ['stripe', 'paypal'])
        self.assertFalse(shop.lax('paypal'))

    def test_the_manual_names_every_event(self):
        with open(os.path.join(os.path.dirname(os.path.dirname(
                os.path.abspath(__file__))), 'man', 'tarsnap-web.8')) as page:
            text = page.read().split('.Sh STRIPE AND PAYPAL')[1]
        self.assertEqual(
            [line.split()[1] for line in text.splitlines()
             if line.startswith('.Li ')],
            tarsnapd.STRIPE_EVENTS + tarsnapd.PAYPAL_EVENTS)

    def test_price(self):
        """Made once; without it there is no paying through Stripe."""
        self.addCleanup(self.keys)
        self.keys(price='')
        self.assertEqual(self.open().shop().offered(), ['paypal'])
        _, out, _ = here('pay', self.path, 'price')
        self.assertRegex(out, r'\Aprice = price_\w+\n\Z')
        self.assertEqual(here('pay', self.path, 'price')[1], out)
        price = self.fake.things[out.split()[2]]
        self.assertEqual((price['unit_amount'], price['currency']),
                         (100, 'usd'))


class Reconcile(Case):

    def test_every_webhook_was_lost(self):
        """Payments, refunds and disputes are found, once."""
        _, one = self.begin()
        self.fake.stripe_pay(one)
        self.fake.stripe_refund(one, 100)
        event = self.fake.stripe_dispute(one, 300)
        self.fake.stripe_closed(event, 'lost')
        _, two = self.begin('paypal')
        self.fake.paypal_approve(two)
        status, out, err = here('pay', self.path, 'reconcile')
        self.assertEqual((status, err), (0, ''))
        self.assertEqual(len(out.splitlines()), 4)
        self.fake.paypal_refund(two, '4.00')
        out = self.reconcile()
        self.assertEqual((len(out.did), out.differs), (1, []))
        self.check(('payment', 1000), ('refund', -100), ('chargeback', -300),
                   ('payment', 1000), ('refund', -400))
        self.assertEqual(here('pay', self.path, 'reconcile'), (0, '', ''))

    def test_what_is_no_checkout(self):
        """It is named, and the others are read."""
        key = 'checkout/due/stray'
        self.server.accounts.put(key, b'{}')
        _, session = self.begin()
        self.fake.stripe_pay(session)
        self.assertIn(key, self.reconcile().differs[0])
        self.server.accounts.delete(key)
        self.server.accounts.put(key, tarsnapd.versioned_encode(
            key, {'time': int(time.time())}))
        self.assertEqual(self.reconcile().differs, [])
        self.server.ahead = 6 * DAY
        self.reconcile()
        self.assertEqual(self.due(), [])
        self.check(('payment', 1000))

    def test_what_differs_is_said(self):
        _, session = self.begin()
        self.fake.stripe_pay(session, amount_total=1)
        status, out, err = here('pay', self.path, 'reconcile')
        self.assertEqual((status, out), (2, ''))
        self.assertIn('is 0.01 USD in place of 10.00 USD', err)

    def test_one_provider_is_down(self):
        """The other one is reconciled, and nothing is taken for read."""
        _, session = self.begin()
        self.fake.stripe_pay(session)
        self.fake.stripe_refund(session, 100)
        _, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.fake.plan = lambda n, method, path: (
            500 if path.startswith('/v1/refunds') else None)
        out = self.reconcile()
        self.assertEqual(len(out.did), 2)
        self.assertIn('500', out.differs[0])
        self.assertEqual([key.split('/')[2] for key in self.server.accounts
                          .list('checkout/seen/')], ['paypal'])
        self.fake.plan = lambda *_: None
        self.reconcile()
        self.check(('payment', 1000), ('refund', -100), ('payment', 1000))

    def test_events_are_read_from_where_the_last_time_ended(self):
        self.reconcile()
        self.server.ahead = 5 * DAY
        self.reconcile()
        self.server.ahead = 6 * DAY
        self.fake.seen.clear()
        self.reconcile()
        asked, = [form for _, path, _, form in self.fake.seen
                  if path == '/v1/events']
        since = int(asked['created[gte]'])
        self.assertLess(abs(since - time.time() - 4 * DAY), 600)
        self.assertEqual(len(self.server.accounts.list('checkout/seen/')), 2)


    def test_a_refund_before_its_payment_was_entered(self):
        """It is read again until an operator has entered that."""
        name, session = self.begin()
        self.fake.stripe_pay(session, amount_total=700)
        self.fake.stripe_refund(session, 700)
        for days in range(4):
            self.server.ahead = days * DAY
            self.assertIn('was not entered', self.reconcile().differs[-1])
        self.server.run(tarsnapd.ledger_pay(
            self.account, 'stripe', session, 7 * ATTO))
        self.assertEqual(self.reconcile().differs, [])
        self.check(('payment', 700), ('refund', -700))

    def test_check_says_that_it_is_not_run(self):
        def look(days):
            found = tarsnapd.Checked(int(time.time()) + days * DAY)
            tarsnapd.check_payments(found, self.server)
            return [status for status, _ in found.faults]
        self.assertEqual(self.server.shop().trials, ['stripe'])
        self.server.shop().trials = []
        self.assertEqual(look(0), [tarsnapd.CHECK_WARNING] * 2)
        self.reconcile()
        self.assertEqual(look(1), [])
        self.assertEqual(look(3), [tarsnapd.CHECK_WARNING] * 2)
        self.assertEqual(look(6), [tarsnapd.CHECK_CRITICAL] * 2)


class Accounts(Case):
    """Where accounts are charged, and mail goes out."""

    PRICES = 'storage-price = 250\nmail-from = backup@example.org\n'

    def test_money_is_there_at_once_and_a_receipt(self):
        self.account = self.server.run(tarsnapd.account_create(
            'zoe@example.net', b'pw'))
        _, session = self.begin()
        self.hook(self.fake.stripe_pay(session))
        self.assertEqual(self.server.perform(
            ('view', 'balance', self.account)).money, 10 * ATTO)
        standing = self.server.run(tarsnapd.versioned_get(
            tarsnapd.standing_prefix(self.account)))
        self.assertEqual(standing[1]['state'], 'ok')
        mails = self.server.run(tarsnapd.mail_list())
        self.assertEqual([(mail['kind'], mail['values']['reference'])
                          for _, mail, _ in mails], [('receipt', session)])
        export = self.server.run(tarsnapd.account_export(self.account))
        self.assertEqual(export['checkouts'][0]['session'], session)
        self.assertEqual(here('scrub', self.path)[0], 0)


class Direct(Case):
    """Very many requests: nothing goes over a wire, and no power is cut."""

    def setUp(self):
        super().setUp()
        for patch in (mock.patch('os.fsync'), mock.patch.object(
                tarsnapd.Provider, '_once',
                lambda *request: self.fake.direct(*request))):
            patch.start()
            self.addCleanup(patch.stop)


class Kills(Direct):
    """A process that dies at any step, and whatever an API does."""

    def lives(self, provider):
        """What happens, one after the other; each is (what the payer or the
        provider does, what we do then).
        """
        fake, now = self.fake, {}

        def ours(key):
            return lambda: now.get(key) and self.hook(now[key])

        def begin():
            now['name'], now['id'] = self.begin(provider)

        def note(key, make, *args):
            def act():
                if 'id' in now:
                    now[key] = make(now['id'], *args)
            return act

        yield lambda: None, begin
        if provider == 'stripe':
            yield note('paid', fake.stripe_pay), ours('paid')
        else:
            yield note('paid', fake.paypal_approve), ours('paid')
        yield lambda: None, lambda: 'name' in now and self.settle(now['name'])
        if provider == 'stripe':
            yield note('back', fake.stripe_refund, 300), ours('back')
            yield note('dispute', fake.stripe_dispute, 700), ours('dispute')
            yield (lambda: 'id' in now and now.update(
                won=fake.stripe_closed(now['dispute'], 'won'))), ours('won')
        else:
            def captured():
                if 'id' in now and fake.under('capture'):
                    now['back'] = fake.paypal_refund(now['id'], '3.00')
            yield captured, ours('back')

    def live(self, provider, at=0):
        """All of it, killed at a wish; then reconcile."""
        self.clear()
        server = self.server
        server.wishes, server.at = 0, at
        for theirs, ours in self.lives(provider):
            theirs()
            with contextlib.suppress(Killed, ProviderError):
                ours()
        server.at = 0
        self.fake.plan = lambda *_: None
        wishes = server.wishes
        out = self.reconcile()
        self.assertEqual(out.differs, [])
        self.assertEqual(self.balance(),
                         self.fake.charged().get(self.account, 0))
        self.assertEqual(self.reconcile().did, [])
        if at == 0 and not self.plan:
            self.assertEqual(out.did, [])
        return wishes

    def test_killed_at_each_step(self):
        for provider in ('stripe', 'paypal'):
            wishes = self.live(provider)
            self.assertGreater(wishes, 30)
            self.assertGreater(self.balance(), 0)
            for at in range(1, wishes + 1):
                with self.subTest(provider, at=at):
                    self.live(provider, at)

    def test_each_request_goes_wrong(self):
        """Once, so that it is repeated; and from then on, until reconcile."""
        for provider in ('stripe', 'paypal'):
            self.live(provider)
            for at in range(1, self.fake.count + 1):
                for fate, on in (('lost', False), ('lost', True),
                                 (500, True), (403, True)):
                    with self.subTest(provider, at=at, fate=fate, on=on):
                        self.plan = lambda n, *_, at=at, fate=fate, on=on: (
                            fate if n == at or on and n > at else None)
                        self.live(provider)

    plan = None

    def clear(self):
        super().clear()
        if self.plan:
            self.fake.plan = self.plan

    def test_many_at_once(self):
        """Webhooks, the payer's return and reconcile, in several processes:
        each has its own files open.
        """
        for provider in ('stripe', 'paypal') * 5:
            self.clear()
            name, ident = self.begin(provider)
            if provider == 'stripe':
                event = self.fake.stripe_pay(ident)
            else:
                event = self.fake.paypal_approve(ident)
            if provider == 'stripe':
                self.fake.stripe_refund(ident, 300)
            servers = [self.open() for _ in range(4)]
            errors, start = [], threading.Barrier(len(servers))

            def act(number, server, event=event, errors=errors, start=start):
                start.wait()
                try:
                    if number % 2:
                        self.hook(event, server)
                    else:
                        errors.extend(self.reconcile(server).differs)
                except Exception as e:
                    errors.append(e)
            threads = [threading.Thread(target=act, args=pair)
                       for pair in enumerate(servers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(errors, [])
            self.assertEqual(self.balance(),
                             self.fake.charged()[self.account])


class Processes(Case):
    """A process of reconcile that the kernel kills, at any call that writes
    or goes to the network.
    """

    SHARE = 8

    def reconciled(self, at, what):
        """A payment by each provider, a refund, and reconcile killed at call
        number `at`; True if it was.
        """
        self.clear()
        _, session = self.begin()
        self.fake.stripe_pay(session)
        self.fake.stripe_refund(session, 300)
        _, order = self.begin('paypal')
        self.fake.paypal_approve(order)
        self.page.set(at, what, 0, faults.WRITES | faults.NETWORK)
        code = subprocess.run(
            [sys.executable, rawclient.program(), 'pay', self.path,
             'reconcile'], stdout=subprocess.DEVNULL, env=dict(
                 os.environ, LD_PRELOAD=self.library,
                 FAULTS_LOG=os.devnull, FAULTS_STATE=self.page.path)
        ).returncode
        self.assertIn(code, (0, -9))
        self.assertEqual(self.reconcile().differs, [])
        self.check(('payment', 1000), ('refund', -300), ('payment', 1000))
        self.assertEqual(self.reconcile().did, [])
        return code != 0

    def test_killed_at_any_call(self):
        where = tempfile.mkdtemp(prefix='faults-')
        self.addCleanup(shutil.rmtree, where)
        self.library = faults.build(where)
        self.page = faults.Faults(os.path.join(where, 'state'))
        self.page.watch(self.path)
        self.assertFalse(self.reconciled(10 ** 6, faults.PASS))
        points = self.page.count
        self.assertGreater(points, 40)
        dice = random.Random(seed_choose('kills among %d calls' % points))
        for at in dice.sample(range(1, points), self.SHARE):
            with self.subTest(at=at):
                met = self.reconciled(at, dice.choice(
                    (faults.KILL, faults.AFTER)))
                # There are fewer if less of what is read is young.
                self.assertTrue(met or at > points * 3 // 4)


class Worlds(Direct):
    """Payers, providers, webhooks, faults and deaths in any order."""

    # How many worlds; PAY_WORLDS=1000 for a long look.
    COUNT = int(os.environ.get('PAY_WORLDS', '25'))
    STEPS = 40

    def test_worlds(self):
        first = seed_choose('payments')
        for seed in range(first, first + self.COUNT):
            with self.subTest(seed=seed):
                self.world(random.Random(seed))

    def world(self, dice):
        self.clear()
        self.dice, self.mail = dice, []     # webhooks that are on their way
        self.checkouts = []                 # [(provider, name, its name)]
        self.disputes = []                  # of Stripe, events
        acts = [self.visitor, self.payer, self.payer, self.taken, self.taken,
                self.webhook, self.webhook, self.webhook, self.returns,
                self.nightly, self.weather]
        for _ in range(self.STEPS):
            self.server.wishes, self.server.at = 0, 0
            if dice.random() < 0.15:
                self.server.at = dice.randrange(1, 25)
            with contextlib.suppress(Killed, ProviderError):
                dice.choice(acts)()
        self.server.at = 0
        self.fake.plan = lambda *_: None
        self.reconcile()
        out = self.reconcile()
        self.assertEqual((out.did, out.differs), ([], []))
        self.assertEqual(self.balance(),
                         self.fake.charged().get(self.account, 0))
        self.assertGreaterEqual(self.balance(), 0)

    def weather(self):
        """The network is good, bad, or worse."""
        bad = self.dice.choice((0, 0, 0.2, 1))
        dice = random.Random(self.dice.random())
        fates = ('lost', 'reset', 500, 429, 404 if bad < 1 else 503)
        self.fake.plan = lambda *_: (
            dice.choice(fates[:4]) if dice.random() < bad else None)

    def visitor(self):
        provider = self.dice.choice(('stripe', 'paypal'))
        name, ident = self.begin(provider, self.dice.randrange(5, 30))
        self.checkouts.append((provider, name, ident))

    def some(self, provider, good):
        """A checkout of which the provider's thing is `good`, or None."""
        found = [ident for one, _, ident in self.checkouts
                 if one == provider and good(self.fake.things[ident])]
        return self.dice.choice(found) if found else None

    def post(self, event):
        """Its webhooks: none, one or two."""
        self.mail += [event] * self.dice.choice((0, 1, 1, 2))

    def payer(self):
        fake, act = self.fake, self.dice.randrange(5)
        if act < 2:
            ident = self.some('stripe', lambda x: x['status'] == 'open')
            if ident:
                self.post(fake.stripe_pay(ident, later=act == 1)
                          if self.dice.random() < .8
                          else fake.stripe_expire(ident))
        elif act == 2:
            ident = self.some('stripe', lambda x: (
                x['status'], x['payment_status']) == ('complete', 'unpaid')
                and fake.things[x['payment_intent']]['status']
                == 'processing')
            if ident:
                self.post(fake.stripe_arrives(ident, self.dice.random() < .7))
        else:
            ident = self.some('paypal', lambda x: x['status'] in (
                'PAYER_ACTION_REQUIRED', 'APPROVED'))
            if ident:
                fake.funds = self.dice.random() < .8
                self.post(fake.paypal_approve(ident))

    def taken(self):
        """Refunds, disputes, and how they end."""
        fake, act = self.fake, self.dice.randrange(5)
        paid = self.some('stripe', lambda x: x['payment_status'] == 'paid')
        if act == 0 and self.disputes:
            event = self.disputes.pop(self.dice.randrange(
                len(self.disputes)))
            self.post(fake.stripe_closed(event, self.dice.choice(
                ('won', 'lost'))))
        elif act < 3 and paid:
            left = fake.stripe_left(paid)
            if not left:
                return
            part = self.dice.randrange(1, left + 1)
            if act == 1:
                self.post(fake.stripe_refund(paid, part))
                if self.dice.random() < .2:
                    self.post(fake.stripe_refund_fails(
                        fake.events['stripe'][-1]))
            else:
                self.disputes.append(fake.stripe_dispute(paid, part))
                self.post(self.disputes[-1])
        elif act >= 3:
            ident = self.some('paypal', fake.paypal_left)
            if ident:
                left = fake.paypal_left(fake.things[ident])
                part = self.dice.randrange(1, left + 1)
                self.post(fake.paypal_refund(ident, '%d.%02d' % divmod(
                    part, 100), self.dice.choice(('REFUNDED', 'REVERSED')),
                    listed=self.dice.random() < .5))

    def webhook(self):
        if self.mail:
            event = self.mail[self.dice.randrange(len(self.mail))]
            self.hook(event)
            self.mail.remove(event)         # it was answered with 200

    def returns(self):
        if self.checkouts:
            self.settle(self.dice.choice(self.checkouts)[1])

    def nightly(self):
        self.reconcile()


class Doubles(Case):
    """Against programs that others wrote."""

    def test_emulate(self):
        """Checkout with its page, and its signature."""
        hooks = paypeer.Hooks(self.addCleanup)
        stripe = paypeer.Emulate(self.addCleanup, hooks.url)
        self.addCleanup(self.keys)
        page = stripe.page
        self.keys(stripe=stripe.url, page=page, price='')
        status, out, err = here('pay', self.path, 'price')
        self.assertEqual((status, err), (0, ''))
        self.keys(stripe=stripe.url, page=page, price=out.split()[2])
        server = self.server = self.open()
        name, url = server.run(tarsnapd.checkout_begin(
            server.shop(), 'stripe', self.account, 25))
        self.assertIn('25.00', stripe.call(
            'GET', url[len(page):]).decode())
        self.assertEqual(self.settle(name).state, 'open')
        self.assertEqual(stripe.pay(url), 'https://backup.example.org/a/'
                         'paid.cgi?checkout=' + name)
        out = Outcome()
        server.run(tarsnapd.pay_webhook(
            server.shop(), out, 'stripe',
            *hooks.wait('checkout.session.completed')))
        self.assertEqual((out.state, self.entries()),
                         ('paid', [('payment', 2500)]))
        self.assertEqual(self.settle(name).did, [])
        # One whose webhook is not listened to, and one that expires.
        name, url = server.run(tarsnapd.checkout_begin(
            server.shop(), 'stripe', self.account, 5))
        stripe.pay(url)
        third, url = server.run(tarsnapd.checkout_begin(
            server.shop(), 'stripe', self.account, 5))
        stripe.call('POST', '/v1/checkout/sessions/%s/expire'
                    % url.rpartition('/')[2])
        out = self.reconcile()
        self.assertEqual(len(out.did), 1)
        # It lists no events; so that was said.
        self.assertIn('stripe: ', out.differs[0])
        self.assertEqual(self.balance(), 3000)
        self.assertEqual(self.due(), [])

    def test_localstripe(self):
        """Refunds, their lists, and its signature."""
        stripe = paypeer.LocalStripe(self.addCleanup)
        hooks = paypeer.Hooks(self.addCleanup)
        stripe.hook(hooks.url)
        name, session = self.begin()
        self.hook(self.fake.stripe_pay(session))
        self.addCleanup(self.keys)
        self.keys(stripe=stripe.url)
        server = self.server = self.open()
        intent = stripe.paid(name, 1000)
        headers, body = hooks.wait('payment_intent.succeeded')
        tarsnapd.stripe_verify(headers['STRIPE-SIGNATURE'], body,
                               server.shop().secrets, time.time())
        for cents in (300, 200):
            stripe.call('POST', '/v1/refunds', {
                'payment_intent': intent, 'amount': cents})
            out = Outcome()
            server.run(tarsnapd.pay_webhook(
                server.shop(), out, 'stripe', *self.fake.hook({
                    'type': 'charge.refunded', 'data': {'object': {
                        'object': 'charge', 'payment_intent': intent}}})))
            self.assertEqual((len(out.did), out.differs), (1, []))
        self.assertEqual(self.entries(), sorted([
            ('payment', 1000), ('refund', -300), ('refund', -200)]))


if __name__ == '__main__':
    unittest.main()
