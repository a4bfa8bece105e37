#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A customer's first days, in a real browser, against real servers: Apache,
an SMTP server, a double of Stripe, and our own over TLS.
"""

import email
import email.policy
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import unittest
import urllib.request

import chromium
import mailpeer
import paypeer
import tarsnapd
import webpeer
from s3peers import SECONDS, free_ports
from test_ledger import turn
from world import Programs, World

ZOE, PASSWORD, NEW = 'zoe@example.org', 'old password', 'new password'
PAY = 'pay-keys = pay.keys\n'


def setUpModule():
    if not shutil.which('chromedriver'):
        raise unittest.SkipTest('no chromedriver (Debian: chromium-driver)')


class Customer(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        clean = cls.addClassCleanup
        cls.post = mailpeer.Peer(clean)
        port, = free_ports(1)
        cls.site = webpeer.Site(
            clean, webpeer.PRICES + PAY + 'mail-smtp = 127.0.0.1:%d\n'
            'mail-tls = no\n' % cls.post.port, PAY,
            server='127.0.0.1:%d' % port)
        stripe = paypeer.Emulate(clean, cls.site.url + 'stripe.cgi')
        stripe.keys((cls.site.web, cls.site.user),
                    (cls.site.srv, os.getuid()))
        cls.serve = subprocess.Popen(
            [sys.executable, Programs.path('tarsnapd'), 'serve', cls.site.srv,
             '--listen', '127.0.0.1:%d' % port],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        clean(cls.serve.wait)
        clean(cls.serve.terminate)
        webpeer.listening(port, cls.serve)
        cls.browser = chromium.Chromium(clean)

    def setUp(self):
        self.now = int(time.time())
        turn(self)

    def mails(self):
        """The texts that the SMTP server has got since, by subject."""
        said, found = [], {}
        self.post.forget()
        tarsnapd.mail_run(self.site.server, said.append)
        self.assertEqual(said, [])
        for mail in self.post.mails():
            self.assertEqual(mail['to'], [ZOE])
            text = email.message_from_string(
                mail['text'], policy=email.policy.default)
            found[text['Subject']] = text.get_content()
        return found

    def link(self):
        """Where the only one of those mails leads."""
        (text,) = self.mails().values()
        return re.search(r'https?://\S+', text)[0]

    def login(self, browser, password):
        browser.go(self.site.url + 'account.html')
        browser.fill(address=ZOE, password=password)
        browser.press(chromium.ENTER)
        browser.wait(lambda: browser.url != self.site.url + 'account.html')

    def fetch(self, url):
        """What a file is that the browser would save."""
        request = urllib.request.Request(url, headers={
            'Cookie': '; '.join('%s=%s' % (one['name'], one['value'])
                                for one in self.browser.cookies())})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read().decode()

    def keygen(self, world):
        """Run the command that the account shows, as one copies it."""
        words = shlex.split(self.browser.texts('pre')[0].replace(
            '\\\n', ' ').replace('NAME', 'laptop').replace(
                '/root', world.root))
        self.assertEqual(words[0], 'tarsnap-keygen')
        done = world.tool(*['keygen'] + words[1:],
                          give=PASSWORD.encode() + b'\n')
        self.assertEqual((done.code, done.err), (0, ''), done)
        world.key = world.path('tarsnap.key')

    def test_first_days(self):
        browser, site = self.browser, self.site
        site.run(tarsnapd.start_make(self.now // tarsnapd.DAY))
        with self.subTest('register'):
            browser.go(site.url)
            browser.follow('Register')
            browser.fill(address=ZOE)
            browser.click('main button')
            browser.go(self.link())
            browser.fill(new=PASSWORD, again=PASSWORD)
            browser.click('main button')
            self.login(browser, PASSWORD)
            self.assertEqual(browser.texts('h1'), ['Your account'])
        with self.subTest('add money'):
            browser.follow('Payments')
            browser.follow('Add money')
            browser.fill(dollars='25')
            browser.click('main button')
            browser.wait(lambda: '/checkout/' in browser.url)
            browser.click('button, input[type=submit]')
            browser.wait(lambda: browser.url.startswith(site.url))
            self.assertIn('Your balance is $25.00', browser.text)
            (receipt,) = self.mails().values()
            self.assertIn('25.00', receipt)
        with self.subTest('back up'):
            browser.follow('Overview')
            world = World(self)
            self.keygen(world)
            os.mkdir(world.path('tree'))
            with open(world.path('tree', 'file'), 'wb') as file:
                file.write(os.urandom(3 * 10 ** 6))
            world.ok('-c', '-f', 'first', '-C', world.root, 'tree')
            usage = world.ok('--usage')
            self.assertIn('25', usage.out, usage)
        self.bill()
        self.forget_password()

    def bill(self):
        """A day later there is something to see."""
        browser, site = self.browser, self.site
        self.serve.terminate()              # traffic is written down
        self.serve.wait()
        self.now += tarsnapd.DAY + 2 * tarsnapd.BILL_LATER
        self.assertEqual(tarsnapd.main(['bill', site.srv]), 0)
        with self.subTest('chart and CSV'):
            browser.go(site.url + 'activity.cgi')
            month = time.strftime('%Y-%m', time.gmtime(
                self.now - tarsnapd.DAY))
            if month not in browser.text:   # the next one has begun
                browser.follow('Month before')
            self.assertTrue(browser.script(
                'return document.querySelector("svg rect")'
                '.getBBox().height > 1'))
            self.assertIn('Daily storage', browser.text)
            self.assertIn(',Daily storage,', self.fetch(browser.script(
                'return Array.from(document.links).find('
                'a => a.text == "CSV").href')))
        with self.subTest('balance'):
            browser.go(site.url + 'manage.cgi')
            self.assertIn('laptop', browser.texts('td')[0])
            self.assertNotIn('$25.00', browser.texts('.facts')[0])
            self.assertIn('$24.9', browser.texts('.facts')[0])
        # Nothing was refused by the policy of the pages.
        self.assertEqual([line for line in browser.complaints()
                          if site.url in line], [])

    def forget_password(self):
        """A link by mail; the new password ends what the old one began."""
        browser, site = self.browser, self.site
        other = chromium.Chromium(self.addCleanup, phone=(390, 844))
        with self.subTest('forgotten password'):
            other.go(site.url + 'account.html')
            other.follow('Forgot your password?')
            other.fill(address=ZOE)
            other.click('main button')
            other.go(self.link())
            other.fill(new=NEW, again=NEW)
            other.click('main button')
            browser.go(site.url + 'settings.cgi')
            self.assertEqual(browser.url, site.url + 'account.html')
        with self.subTest('log out everywhere'):
            self.login(browser, NEW)
            self.login(other, NEW)
            browser.go(site.url + 'settings.cgi')
            browser.click('form[action="sessions.cgi"] button')
            for one in (browser, other):
                one.go(site.url + 'manage.cgi')
                self.assertEqual(one.url, site.url + 'account.html')


class Looks(unittest.TestCase):
    """What no reader of HTML sees."""

    @classmethod
    def setUpClass(cls):
        cls.site = webpeer.Site(cls.addClassCleanup)
        ident = cls.site.account()
        webpeer.sample(cls.site, ident, 30)
        webpeer.pay(cls.site, ident, '2026-0711', 20)
        cls.browser = chromium.Chromium(cls.addClassCleanup,
                                        phone=(360, 740))
        browser = cls.browser
        browser.go(cls.site.url + 'account.html')
        browser.fill(address='ann@example.org', password='correct horse')
        browser.click('main button')

    def pages(self):
        for page in chromium.OUTSIDE[:2] + chromium.INSIDE:
            with self.subTest(page):
                self.browser.go(self.site.url + page)
                yield page

    def test_nothing_is_cut_off_on_a_phone(self):
        for _ in self.pages():
            self.assertLessEqual(self.browser.script(
                'return document.documentElement.scrollWidth'), 360)

    def test_dark(self):
        self.addCleanup(self.browser.emulate, prefers_color_scheme='')
        self.browser.go(self.site.url + 'manage.cgi')
        shades = []
        for scheme in ('light', 'dark'):
            self.browser.emulate(prefers_color_scheme=scheme)
            shades.append([sum(map(int, re.findall(r'\d+', color)[:3]))
                           for color in self.browser.script(
                               'let s = getComputedStyle(document.body); '
                               'return [s.color, s.backgroundColor]')])
        (ink, paper), (chalk, slate) = shades
        self.assertLess(ink + 300, paper)
        self.assertLess(slate + 300, chalk)

    def test_keyboard(self):
        """Tab goes to each link and field in turn, and shows where it is."""
        browser = self.browser
        browser.go(self.site.url + 'settings.cgi')
        seen = set()
        for _ in range(12):
            browser.press('\ue004')
            seen.add(browser.script(
                'let e = document.activeElement, s = getComputedStyle(e); '
                'return e.tagName + (e.name || e.text || "") + '
                '(s.outlineStyle == "none" ? " hidden" : "")'))
        self.assertGreater(len(seen), 8)
        self.assertEqual([one for one in seen if 'hidden' in one], [])

    def test_fields_have_labels(self):
        for _ in self.pages():
            self.assertEqual(self.browser.script(
                'return Array.from(document.querySelectorAll('
                '"input:not([type=hidden]):not([hidden])")).filter('
                'e => !e.labels.length).map(e => e.name)'), [])


if __name__ == '__main__':
    unittest.main()
