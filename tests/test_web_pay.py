#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Paying on the pages, under a real Apache: where browsers are sent, what
webhooks do, and who is not believed.
"""

import http.client
import os
import subprocess
import sys
import threading
import time
import unittest

import paypeer
import rawclient
import tarsnapd
from tarsnapd import ATTO
from webpeer import PRICES, Browser, Site, validate


class Case(unittest.TestCase):

    users = 0                       # that there are

    @classmethod
    def setUpClass(cls):
        cls.fake = paypeer.Fake(cls.addClassCleanup)
        cls.site = Site(cls.addClassCleanup, PRICES + 'pay-keys = pay.keys\n',
                        'pay-keys = pay.keys\npay-most = 200\n')
        cls.keys()

    @classmethod
    def keys(cls, **values):
        """One file for the pages, and one for the server."""
        for path, user in ((cls.site.web, cls.site.user),
                           (cls.site.srv, os.getuid())):
            cls.fake.keys(os.path.join(path, 'pay.keys'), user, **values)

    def setUp(self):
        self.fake.reset()
        Case.users += 1
        self.address = 'u%d@example.org' % Case.users
        self.ident = self.site.account(self.address, b'correct horse')
        self.browser = Browser(self.site)
        self.browser.login(self.address)

    def pay(self, provider='stripe', dollars='10'):
        """Where the browser is sent to pay."""
        self.browser.go('pay.cgi')
        page = self.browser.send('pay.cgi', provider=provider,
                                 dollars=dollars)
        self.assertEqual(page.status, 303, page.text + self.site.log())
        url = page.headers['Location']
        self.assertTrue(url.startswith(self.fake.url + '/'), url)
        return url.replace('=', '/').rpartition('/')[2]

    def hook(self, event, **how):
        """A webhook comes; the status of the answer."""
        headers, body = self.fake.hook(event, **how)
        return self.post('paypal.cgi' if 'event_type' in event
                         else 'stripe.cgi', headers, body)

    def post(self, script, headers, body):
        connection = http.client.HTTPConnection('127.0.0.1', self.site.port,
                                                timeout=60)
        try:
            connection.request('POST', '/' + script, body, dict(
                headers, **{'Content-Type': 'application/json'}))
            return connection.getresponse().status
        finally:
            connection.close()

    def entries(self):
        found = self.site.run(tarsnapd.pay_entries(self.ident))
        return sorted((money.kind, money.amount * 100 // ATTO)
                      for money in found.values())


class Paying(Case):

    def test_by_stripe(self):
        """From the form to the receipt."""
        page = self.browser.go('payments.cgi')
        self.assertIn('href="pay.cgi"', page.text)
        page = form = self.browser.go('pay.cgi')
        self.assertIn('min="5" max="200"', page.text)
        self.assertIn('This is a trial', page.text)     # by its key
        # Browsers hold form-action against where a form is sent on to.
        self.assertIn("form-action 'self' %s" % self.fake.url,
                      page.headers['Content-Security-Policy'])
        session = self.pay()
        back = self.fake.things[session]['success_url']
        self.assertTrue(back.startswith(self.site.url + 'paid.cgi?'), back)
        back = back[len(self.site.url):]
        page = self.browser.go(back)
        self.assertIn('Nothing was charged', page.text)
        self.assertEqual(validate([form.text, page.text]), '')
        event = self.fake.stripe_pay(session)
        self.assertEqual(self.hook(event), 200, self.site.log())
        self.assertEqual(self.entries(), [('payment', 1000)])
        page = self.browser.go(back)
        self.assertIn('Your balance is $10.00', page.text)
        self.assertIn(session, self.browser.go('payments.cgi').text)
        mails = [mail for _, mail, _ in self.site.run(tarsnapd.mail_list())
                 if mail['account'] == self.ident]
        self.assertEqual([mail['kind'] for mail in mails], ['receipt'])
        # Twice, and what came back.
        self.assertEqual(self.hook(event), 200)
        self.assertEqual(self.hook(self.fake.stripe_refund(session, 250)),
                         200)
        self.assertEqual(self.entries(), [('payment', 1000),
                                          ('refund', -250)])
        self.assertIn('Refund', self.browser.go('payments.cgi').text)

    def test_by_paypal(self):
        order = self.pay('paypal')
        self.fake.paypal_approve(order)
        asked = self.fake.things[order]['purchase_units'][0]['custom_id']
        page = self.browser.go('paid.cgi?checkout=%s&token=%s&PayerID=X'
                               % (asked, order))
        self.assertIn('Your balance is $10.00', page.text)
        for event in list(self.fake.events['paypal']):
            self.assertEqual(self.hook(event), 200, self.site.log())
        self.assertEqual(self.entries(), [('payment', 1000)])

    def test_webhook_before_the_payer(self):
        order = self.pay('paypal')
        self.assertEqual(self.hook(self.fake.paypal_approve(order)), 200,
                         self.site.log())
        self.assertEqual(self.entries(), [('payment', 1000)])

    def test_a_provider_that_is_down(self):
        """Who pays hears that nothing was charged; a webhook comes again."""
        session = self.pay()
        event = self.fake.stripe_pay(session)
        self.fake.plan = lambda *_: 400
        self.assertEqual(self.hook(event), 503)
        self.browser.go('pay.cgi')
        page = self.browser.send('pay.cgi', provider='stripe', dollars='10')
        self.assertEqual(page.status, 503)
        self.assertIn('Nothing was charged', page.text)
        asked = self.fake.things[session]['metadata']['checkout']
        self.assertIn('We cannot see now', self.browser.go(
            'paid.cgi?checkout=' + asked).text)
        self.assertEqual(self.entries(), [])
        self.fake.plan = lambda *_: None
        self.assertEqual(self.hook(event), 200)
        self.assertEqual(self.entries(), [('payment', 1000)])

    def test_all_at_once(self):
        """Webhooks, the payer and reconcile, each a process of its own."""
        session = self.pay()
        event = self.fake.stripe_pay(session)
        self.fake.stripe_refund(session, 100)
        asked = self.fake.things[session]['metadata']['checkout']
        said, program = [], rawclient.program()
        acts = [lambda: said.append(self.hook(event)) for _ in range(4)]
        acts.append(lambda: self.browser.go('paid.cgi?checkout=' + asked))
        acts += [lambda: said.append(subprocess.run(
            [sys.executable, program, 'pay', self.site.srv,
             'reconcile'], stdout=subprocess.DEVNULL,
            check=False).returncode) for _ in range(2)]
        threads = [threading.Thread(target=act) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(said), [0, 0, 200, 200, 200, 200],
                         self.site.log())
        self.assertEqual(self.entries(), [('payment', 1000),
                                          ('refund', -100)])
        mails = [mail for _, mail, _ in self.site.run(tarsnapd.mail_list())
                 if mail['account'] == self.ident]
        self.assertEqual(len(mails), 1)


class Refused(Case):

    def test_webhooks(self):
        session = self.pay()
        event = self.fake.stripe_pay(session)
        headers, body = self.fake.hook(event)
        self.assertEqual(self.hook(event, secret='whsec_other'), 400)
        self.assertEqual(self.hook(event, when=int(time.time()) - 400), 400)
        self.assertEqual(self.post('stripe.cgi', headers, body + b' '), 400)
        self.assertEqual(self.post('stripe.cgi', {}, body), 400)
        self.assertEqual(self.post('paypal.cgi', headers, body), 400)
        self.assertEqual(self.post('stripe.cgi', headers, b' ' * 65537), 413)
        self.assertEqual(Browser(self.site).get('stripe.cgi').status, 405)
        self.assertEqual(self.entries(), [])
        self.assertEqual(self.fake.count, 1)    # nobody was asked for it
        self.assertNotIn('whsec', self.site.log())

    def test_a_proxy_that_the_client_names(self):
        """CGI makes HTTP_PROXY of it; requests do not go there."""
        session = self.pay()
        headers, body = self.fake.hook(self.fake.stripe_pay(session))
        self.assertEqual(self.post('stripe.cgi', dict(
            headers, Proxy='http://127.0.0.1:1/'), body), 200)
        self.assertEqual(self.entries(), [('payment', 1000)])

    def test_forms(self):
        self.browser.go('pay.cgi')
        for dollars, provider, says in (
                ('4', 'stripe', '$5 to $200'), ('201', 'stripe', '$5 to'),
                ('10.5', 'stripe', 'whole dollars'), ('', 'stripe', 'whole'),
                ('9' * 30, 'stripe', 'whole'), ('10', 'cash', 'no way to'),
                ('10', '<b>', 'no way to')):
            self.browser.go('pay.cgi')
            page = self.browser.send('pay.cgi', provider=provider,
                                     dollars=dollars)
            self.assertEqual(page.status, 400)
            self.assertIn(says, page.text)
            self.assertNotIn('<b>', page.text)
        # Without our token, and without an account.
        page = self.browser.post('pay.cgi', {'dollars': '10',
                                             'provider': 'stripe'})
        self.assertEqual(page.status, 403)
        page = Browser(self.site).post('pay.cgi', {'dollars': '10',
                                                   'provider': 'stripe'})
        self.assertEqual(page.headers['Location'], 'account.html')
        self.assertEqual(self.fake.count, 0)

    def test_checkouts_of_others(self):
        session = self.pay()
        asked = self.fake.things[session]['metadata']['checkout']
        self.fake.stripe_pay(session)
        self.setUp_other()
        for name in (asked, self.ident + asked[16:], '', '..%2f..'):
            page = self.other.go('paid.cgi?checkout=' + name)
            self.assertEqual(page.status, 404, name)
            self.assertNotIn('10.00', page.text)

    def setUp_other(self):
        Case.users += 1
        address = 'u%d@example.org' % Case.users
        self.site.account(address, b'correct horse')
        self.other = Browser(self.site)
        self.other.login(address)

    def test_keys_that_others_can_read(self):
        file = os.path.join(self.site.web, 'pay.keys')
        self.addCleanup(os.chmod, file, 0o600)
        os.chmod(file, 0o604)
        self.assertEqual(self.browser.go('pay.cgi').status, 503)
        self.assertIn('others can read it', self.site.log())
        self.assertNotIn('sk_', self.site.log())


class Emulate(Case):

    def test_a_real_stripe_double(self):
        """Its page, its button, its webhook to us."""
        stripe = paypeer.Emulate(self.addCleanup,
                                 self.site.url + 'stripe.cgi')
        self.addCleanup(self.keys)
        stripe.keys((self.site.web, self.site.user))
        self.browser.go('pay.cgi')
        url = self.browser.send('pay.cgi', provider='stripe', dollars='25'
                                ).headers['Location']
        back = stripe.pay(url)
        self.assertTrue(back.startswith(self.site.url), back)
        self.assertIn('$25.00', self.browser.go(
            back[len(self.site.url):]).text)
        end = time.monotonic() + 20
        while 'entered for account' not in self.site.log():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.05)
        self.assertEqual(self.entries(), [('payment', 2500)])


if __name__ == '__main__':
    unittest.main()
