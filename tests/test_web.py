#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The account pages under a real Apache: what each shows and does."""

import csv
import io
import json
import os
import re
import time
import unittest

from webpeer import (
    ATTO, DAY, Browser, Site, pay, sample, tarsnapd, validate)

ANN, PASSWORD = 'ann@example.org', 'correct horse'
DAYS = 70


class Case(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.site = Site(cls.addClassCleanup)

    def setUp(self):
        self.browser = Browser(self.site)

    def ok(self, page, *words):
        self.assertEqual(page.status, 200, page.text + self.site.log())
        for word in words:
            self.assertIn(word, page.text)
        return page

    def logged_in(self, address=ANN, password=PASSWORD):
        self.ok(self.browser.login(address, password), 'Your account')
        self.assertEqual(self.browser.here, 'manage.cgi')
        return self.browser


class Figures(Case):
    """What is shown of a filled account."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ident = cls.site.account()
        cls.numbers = sample(cls.site, cls.ident, DAYS)
        pay(cls.site, cls.ident, 'A1', 20)
        pay(cls.site, cls.ident, 'A1.refund', -3, 'refund')
        cls.today = int(time.time()) // DAY

    def usages(self):
        """[(day, machine, Used, amounts)], read anew from the ledger."""
        found = []
        for day in range(self.today - DAYS, self.today):
            for shard in tarsnapd.SHARDS:
                usage = self.site.run(tarsnapd.usage_get(day, shard))
                found += [(day, machine, row, usage.amounts(machine))
                          for machine, row in usage.rows.items()]
        return found

    def balance(self):
        return 17 * ATTO - sum(sum(x[3]) for x in self.usages())

    def program(self, path='manage.cgi', **fields):
        fields = dict({'address': ANN, 'password': PASSWORD}, **fields)
        page = Browser(self.site).post(path, fields)
        self.assertEqual(page.status, 200, page.text)
        return page

    def csv(self, **fields):
        page = self.program(format='csv', **fields)
        self.assertTrue(page.headers['Content-Type'].startswith('text/csv'))
        self.assertNotIn('Set-Cookie', page.headers)
        return list(csv.reader(io.StringIO(page.text)))

    def test_home(self):
        self.ok(self.browser.get(''), 'Sample Backups', '0.25 dollars')
        self.assertNotIn('status"', self.browser.page.text)
        for said, shown in (
                ('tarsnapd OK - b:9279: wrote a block|time=0.1s', 'It works'),
                ('tarsnapd CRITICAL - b:9279: refused', 'There is trouble'),
                ('tarsnapd UNKNOWN', 'There is trouble'), ('', 'Prices')):
            with open(self.site.file('web/status'), 'w') as file:
                file.write(said)
            page = self.ok(self.browser.get('index.html'), shown)
            self.assertEqual('Status' in page.text, bool(said))
            self.assertNotIn('9279', page.text)
        with open(file.name, 'w') as file:
            file.write('tarsnapd OK')
        then = int(time.time()) - 7200
        os.utime(file.name, (then, then))
        self.ok(self.browser.get(''), 'has not been looked at since '
                '<time>' + tarsnapd.moment(then)[:16])
        os.unlink(file.name)

    def test_prices_of_nothing(self):
        """Are none: nobody is told to pay."""
        facts = self.site.run(tarsnapd.site_get())
        self.addCleanup(self.site.run, tarsnapd.site_put(facts))
        self.site.account('poor@example.org')
        poor = Browser(self.site)
        self.ok(poor.login('poor@example.org', PASSWORD),
                'Your balance is used up')
        for prices, pays in (([0, 0, 0], False), ([0, 0, 1], True)):
            self.site.run(tarsnapd.site_put(dict(facts, prices=prices)))
            page = self.ok(poor.get('manage.cgi'))
            self.assertEqual('Your balance' in page.text, pays)
            page = self.ok(poor.get(''))
            self.assertEqual('Nobody pays here.' in page.text, not pays)

    def test_overview(self):
        page = self.logged_in().page
        money = tarsnapd.money_short(self.balance())
        self.assertEqual(re.search(r'\$\d+\.\d+', page.text)[0], money)
        self.assertIn('www1.example.org', page.text)
        self.assertRegex(page.text, r'laptop.*silent for 13 days, usually 1<')
        self.assertEqual(page.text.count('silent'), 1)
        held = sum(row.bytes for day, _, row, _ in self.usages()
                   if day == self.today - 1)
        self.assertIn('%.3g GB' % (held / 1e9), page.text)
        self.assertIn(
            'tarsnap-keygen --keyfile /root/tarsnap.key --machine NAME \\\n'
            '    --server backup.example.org:9279 --user %s \\\n'
            '    --fingerprint %s' % (ANN, self.site.server.fingerprint()),
            page.text)

    def test_program_verbose(self):
        rows = self.csv(action='verboseactivity')
        self.assertEqual(rows[0], ['RECTYPE', 'DATE', 'MACHINE', 'TYPE',
                                   'QUANTITY', 'AMOUNT', 'BALANCE'])
        names = dict(zip(self.numbers, ('www1.example.org', 'mail',
                                        'laptop')))
        kinds = ('Daily storage', 'Client->Server bandwidth',
                 'Server->Client bandwidth')
        first = rows[1][1]
        month = self.today
        for _ in range(2):                      # the one before last
            month = tarsnapd.month_days(month)[0] - 1
        self.assertEqual(first, tarsnapd.day_text(max(
            tarsnapd.month_days(month)[0], self.today - DAYS)))
        wanted = sorted(
            ('Usage', tarsnapd.day_text(day), names[machine], kind,
             '%d' % quantity, tarsnapd.money_text(amount), '')
            for day, machine, row, amounts in self.usages()
            for kind, quantity, amount in zip(
                kinds, (row.stored, row.up, row.down), amounts)
            if quantity and tarsnapd.day_text(day) >= first)
        self.assertEqual(sorted(tuple(row) for row in rows
                                if row[0] == 'Usage'), wanted)
        self.assertEqual([row[1] for row in rows[1:]], sorted(
            row[1] for row in rows[1:]))
        # Each day begins with its balance, and the last one is of now.
        seen = set()
        for row in rows[1:]:
            self.assertEqual(row[0] == 'Balance', row[1] not in seen, row)
            seen.add(row[1])
        last = [row for row in rows if row[0] == 'Balance'][-1]
        self.assertEqual(last, [
            'Balance', tarsnapd.day_text(self.today), '', '', '', '',
            tarsnapd.money_text(self.balance())])

    def test_balances_add_up(self):
        """From day to day, by what is in between."""
        def amount(text):
            return tarsnapd.money_parse(text.lstrip('-')) * (
                -1 if text.startswith('-') else 1)

        rows = self.csv(action='activity', since=tarsnapd.day_text(
            self.today - DAYS))[1:]
        balance, wanted = 0, None
        for kind, _, _, _, change, text in rows + [rows[0]]:
            if kind == 'Balance':
                self.assertIn(wanted, (None, balance))
                balance, wanted = (balance if wanted is None else wanted,
                                   amount(text))
            else:
                balance += amount(change) * (-1 if kind == 'Usage' else 1)
        self.assertEqual(balance, self.balance())

    def test_it_is_what_the_operator_says_of_each_month(self):
        """Whose statement is made of the ledger, without a view."""
        names = dict(zip(self.numbers, ('www1.example.org', 'mail',
                                        'laptop')))
        rows = self.csv(action='verboseactivity', since=tarsnapd.day_text(
            self.today - DAYS))[1:]
        first = tarsnapd.month_days(self.today - DAYS)[0]
        found, balances = [], {}
        while first <= self.today:
            _, opening, lines, closing, wrong = self.site.run(
                tarsnapd.account_statement(self.ident, first))
            self.assertEqual((opening, wrong),
                             (balances.get(first - 1, 0), []))
            for line in lines:
                money = line.quantity is None
                found.append((
                    'Payment' if money else 'Usage',
                    tarsnapd.day_text(line.day), names.get(line.machine, ''),
                    line.kind, '' if money else '%d' % line.quantity,
                    tarsnapd.money_text(line.amount * (1 if money else -1)),
                    ''))
            first = tarsnapd.month_days(first)[1]
            balances[first - 1] = closing
        self.assertGreater(len(found), 3 * DAYS)
        self.assertEqual(sorted(found), sorted(
            tuple(row) for row in rows if row[0] != 'Balance'))
        said = {row[1]: row[6] for row in rows if row[0] == 'Balance'}
        for day, balance in balances.items():
            self.assertEqual(said[tarsnapd.day_text(min(day, self.today))],
                             tarsnapd.money_text(balance), day)

    def test_two_of_one_name(self):
        """They are told apart by their numbers."""
        accounts, places = self.site.server.accounts, []
        for number in self.numbers[:2]:
            place = 'owned/%s/%s' % (self.ident, number)
            places.append((place, accounts.get(place)))
            accounts.delete(place)
            self.site.run(tarsnapd.owned_put(self.ident, int(number, 16),
                                             'twin'))
        try:
            rows = self.csv(action='verboseactivity')[1:]
        finally:
            for place, data in places:
                accounts.delete(place)
                accounts.put(place, data)
        self.assertEqual({row[2] for row in rows if row[2]}, {
            'laptop', *('twin (%s)' % number for number in self.numbers[:2])})

    def test_program_one_machine(self):
        number = self.numbers[1]
        rows = self.csv(action='subactivity', mid=number)
        self.assertEqual(rows[0], ['DATE', 'TYPE', 'QUANTITY', 'AMOUNT'])
        wanted = sum(sum(amounts) for day, machine, _, amounts
                     in self.usages() if machine == number
                     and tarsnapd.day_text(day) >= rows[1][0])
        self.assertEqual(sum(tarsnapd.money_parse(row[3])
                             for row in rows[1:]), wanted)
        page = Browser(self.site).post('manage.cgi', {
            'address': ANN, 'password': PASSWORD, 'action': 'subactivity',
            'mid': '0' * 16, 'format': 'csv'})
        self.assertEqual(page.status, 404)

    def test_program_parameters_in_the_query(self):
        page = self.program('manage.cgi?action=activity&format=csv')
        self.assertTrue(page.text.startswith('RECTYPE,DATE,TYPE,'))

    def test_program_pages(self):
        self.assertRegex(self.program().text, r'\$\d+\.\d\d')
        for fields in ({'action': 'activity'}, {'action': 'verboseactivity'},
                       {'action': 'subactivity', 'mid': self.numbers[0]}):
            self.assertRegex(self.program(**fields).text,
                             r'<td[^>]*>\d+ bytes<')

    def test_program_refused(self):
        page = self.program(address='bob@example.org', action='activity',
                            format='csv')
        self.assertIn('<html', page.text)
        self.assertIn('No user exists with the provided email address; '
                      'please try again.', page.text)
        page = self.program(password='wrong', action='activity')
        self.assertIn('Password is incorrect; please try again.', page.text)

    def test_activity(self):
        browser = self.logged_in()
        month = tarsnapd.month_text(self.today - 40)
        page = self.ok(browser.get('activity.cgi?month=' + month),
                       '<svg', 'Daily storage')
        self.assertNotIn('laptop</td>', page.text)
        self.ok(browser.get('activity.cgi?view=machines&month=' + month),
                'laptop</td>')
        page = self.ok(browser.get('activity.cgi?format=csv&month=' + month))
        self.assertEqual({line[:11] for line in page.text.split('\n')
                          if line.startswith('Usage')}, {'Usage,' + month[:5]
                                                         })
        self.assertEqual(browser.get('activity.cgi?month=x').status, 400)
        self.ok(browser.get('activity.cgi?month=1999-02'))

    def test_machine(self):
        browser = self.logged_in()
        self.ok(browser.get('machine.cgi?mid=' + self.numbers[2]),
                '<h1>laptop</h1>', 'silent for 13 days', '<svg')
        self.assertEqual(browser.get('machine.cgi?mid=' + '1' * 16).status,
                         404)

    def test_payments_and_receipt(self):
        browser = self.logged_in()
        page = self.ok(browser.get('payments.cgi'), '+$20.00', '-$3.00')
        link, = re.findall(r'receipt\.cgi\?[^"]*', page.text)
        self.ok(browser.get(link), '$20.00', 'bank-A1', ANN)
        self.assertEqual(browser.get('receipt.cgi?entry=bank-A2').status, 404)

    def test_export(self):
        page = self.ok(self.logged_in().get('export.cgi'))
        found = json.loads(page.text)
        self.assertEqual(found['account'][0]['address'], ANN)
        self.assertEqual({machine['name'] for machine in found['machines']},
                         {'www1.example.org', 'mail', 'laptop'})
        self.assertEqual(len(found['usage']), 3 * DAYS)
        self.assertNotIn('stored": "', page.text)

    def test_notice(self):
        path = self.site.file('web/notice')
        with open(path, 'w') as file:
            file.write('Down <tonight>\n')
        try:
            self.ok(self.browser.get(''), 'Down &#60;tonight&#62;')
        finally:
            os.unlink(path)

    def test_valid_html(self):
        """Each page, by a validator."""
        texts = {}
        for path in ('', 'account.html', 'register.cgi', 'forgot.cgi',
                     'confirm.cgi?link=x'):
            texts[path] = self.browser.get(path).text
        browser = self.logged_in()
        for path in ('manage.cgi', 'activity.cgi', 'payments.cgi',
                     'activity.cgi?view=machines', 'settings.cgi',
                     'receipt.cgi?entry=bank-A1',
                     'machine.cgi?mid=' + self.numbers[0]):
            texts[path] = self.ok(browser.get(path)).text
        self.assertEqual(validate(texts.values()), '')


class Doing(Case):
    """What changes something."""

    def test_a_life(self):
        """Register, confirm, forget the password, move, close."""
        browser, site = self.browser, self.site
        browser.go('register.cgi')
        self.ok(browser.send('register.cgi', address='zoe@example.org'),
                'zoe@example.org')
        link = site.link('confirm-address', 'zoe@example.org')
        self.ok(browser.get(link), 'Choose a password')
        self.assertEqual(browser.send('confirm.cgi', new='short',
                                      again='short').status, 400)
        browser.get(link)
        self.ok(browser.send('confirm.cgi', new='old password',
                             again='old password'), 'is there')
        self.assertEqual(browser.get(link).status, 410)
        self.logged_in('zoe@example.org', 'old password')

        other = Browser(site)
        other.go('forgot.cgi')
        other.send('forgot.cgi', address='Zoe@example.org')
        other.get(site.link('reset-password', 'zoe@example.org'))
        self.ok(other.send('confirm.cgi', new='new password',
                           again='new password'), 'was changed')
        self.assertEqual([mail[0] for mail in site.mails()],
                         ['password-changed'])
        # What was open with the old one is no more.
        self.assertEqual(browser.go('manage.cgi').status, 200)
        self.assertEqual(browser.here, 'account.html')
        self.assertEqual(browser.login('zoe@example.org',
                                       'old password').status, 403)
        self.logged_in('zoe@example.org', 'new password')

        browser.go('settings.cgi')
        browser.send('address.cgi', address='zoe@example.net',
                     password='new password')
        browser.get(site.link('confirm-address', 'zoe@example.net'))
        self.ok(browser.send('confirm.cgi'), 'zoe@example.net')
        self.assertEqual([mail[:2] for mail in site.mails()],
                         [('address-changed', 'zoe@example.org')])
        self.logged_in('zoe@example.net', 'new password')

        browser.go('settings.cgi')
        self.assertEqual(browser.send('close.cgi', password='no').status,
                         403)
        browser.go('settings.cgi')
        self.ok(browser.send('close.cgi', password='new password'),
                'is closed')
        self.assertEqual(browser.login('zoe@example.net',
                                       'new password').status, 403)

    def test_an_account_that_is_there(self):
        """Who registers again is told so, by mail alone."""
        self.site.account('eve@example.org')
        self.browser.go('register.cgi')
        self.browser.send('register.cgi', address='Eve@example.org')
        (kind, to, values), = self.site.mails()
        self.assertEqual((kind, to), ('have-account', 'eve@example.org'))
        self.assertEqual(values['forgot'], self.site.url + 'forgot.cgi')

    def test_sessions(self):
        """Each is listed; a new password or the button ends the others."""
        self.site.account('joe@example.org')
        first, second, third = (Browser(self.site) for _ in range(3))
        for browser in (first, second, third):
            browser.login('joe@example.org')
        page = third.get('settings.cgi')
        self.assertEqual(page.text.count('127.0.0.1'), 3)
        self.ok(third.send('password.cgi', password=PASSWORD,
                           new='another one', again='another one'))
        self.assertEqual(third.here, 'settings.cgi')
        self.assertEqual(third.page.text.count('127.0.0.1'), 1)
        first.go('manage.cgi')
        self.assertEqual(first.here, 'account.html')
        self.site.mails()
        first.login('joe@example.org', 'another one')
        third.go('settings.cgi')
        third.send('sessions.cgi')
        for browser in (first, third):
            browser.go('manage.cgi')
            self.assertEqual(browser.here, 'account.html')

    def test_in_and_out(self):
        self.site.account()
        browser = self.logged_in()
        cookies = dict(browser.cookies)
        self.ok(browser.send('logout.cgi'), 'Log in')
        # Also who kept the cookie is out.
        browser.cookies = cookies
        browser.go('manage.cgi')
        self.assertEqual(browser.here, 'account.html')

    def test_news(self):
        self.site.account('ned@example.org')
        browser = self.logged_in('ned@example.org')
        browser.go('settings.cgi')
        self.ok(browser.send('news.cgi'), 'Announcements are mailed')
        self.assertTrue(self.site.run(tarsnapd.account_need(
            'ned@example.org'))[1]['news'])
        self.ok(browser.send('news.cgi'), 'are not mailed')

    def test_a_new_account_is_empty(self):
        self.site.account('new@example.org')
        page = self.logged_in('new@example.org').page
        self.ok(page, '$0.00', 'There is none yet', 'nothing yet')
        for path in ('activity.cgi', 'payments.cgi', 'settings.cgi',
                     'export.cgi'):
            self.ok(self.browser.get(path))

    def test_links_that_lead_to_the_first_page(self):
        """As they do where web-url names no script."""
        page = self.browser.get('?link=a.b%0d%0ax:%20y')
        self.assertEqual((page.status, page.headers['Location']),
                         (303, 'confirm.cgi?link=a.b%0D%0Ax%3A%20y'))
        self.assertEqual(self.browser.follow().status, 410)

    def test_no_page_of_that_name(self):
        for path, status in (('web.py', 403), ('nothing.cgi', 404),
                             ('alarm.cgi', 403), ('__pycache__/', 403)):
            page = self.browser.get(path)
            self.assertEqual((path, page.status), (path, status))
            self.assertIn('no such page', page.text)
            self.assertEqual(page.headers['X-Frame-Options'], 'DENY')


if __name__ == '__main__':
    unittest.main()
