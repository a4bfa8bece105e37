#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The account pages under a real Apache: what each shows and does."""

import unittest

from webpeer import Browser, Site, pay, sample


class Pages(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.site = Site(cls.addClassCleanup)
        cls.ident = cls.site.account()
        cls.numbers = sample(cls.site, cls.ident, 40)
        pay(cls.site, cls.ident, 'A1', 20)

    def setUp(self):
        self.browser = Browser(self.site)

    def test_home(self):
        page = self.browser.get('')
        self.assertEqual(page.status, 200, self.site.log())
        self.assertIn('Sample Backups', page.text)
        self.assertIn('0.25 dollars', page.text)

    def test_in_and_out(self):
        page = self.browser.login()
        self.assertEqual((page.status, self.browser.here),
                         (200, 'manage.cgi'), self.site.log())
        self.assertIn('Your account', page.text)
        self.assertIn('www1.example.org', page.text)
        page = self.browser.send('logout.cgi')
        self.assertIn('Log in', page.text)
        self.assertEqual(self.browser.go('manage.cgi').status, 200)
        self.assertEqual(self.browser.here, 'account.html')


if __name__ == '__main__':
    unittest.main()
