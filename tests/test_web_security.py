#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What strangers and thieves try at the account pages, and do not get."""

import glob
import html.parser
import os
import re
import subprocess
import sys
import time
import unittest
from unittest import mock

import webpeer
from webpeer import Browser, Form, Site, sample, tarsnapd

sys.path.insert(0, os.path.join(webpeer.ROOT, 'cgi-bin'))
import web                                              # noqa: E402

ANN, PASSWORD = 'ann@example.org', 'correct horse'
SCRIPTS = sorted(os.path.basename(path) for path in glob.glob(os.path.join(
    webpeer.ROOT, 'cgi-bin', '*.cgi')) if 'alarm' not in path)
# A provider or a program says itself who it is: no form of ours is sent.
STRANGERS = {'manage.cgi', 'stripe.cgi', 'paypal.cgi'}
# Names that would be something else in HTML, a header, a shell or a sheet.
NASTY = ('<script>alert(1)</script>', '"><img src=x onerror=y>',
         "'; rm -rf / #", '=1+1', '&lt;b&gt;', 'a\u202eb', '{0.__class__}',
         'x' * 255)


class Case(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.site = Site(cls.addClassCleanup)
        cls.ident = cls.site.account()

    def setUp(self):
        self.browser = Browser(self.site)
        # Tests of throttles must not meet in other tests.
        path = self.site.file('web/guesses')
        if os.path.exists(path):
            os.unlink(path)

    def logged_in(self):
        self.assertEqual(self.browser.login().status, 200)
        return self.browser

    def state(self):
        """All objects among the accounts but sessions."""
        return [key for key in self.site.server.accounts.list('')
                if not key.startswith(('session/', '.'))]

    def run_script(self, name, body=b'', **environ):
        """What a script prints when it is run by itself."""
        environ = dict({
            'TARSNAP_WEB': self.site.web, 'REQUEST_METHOD': 'GET',
            'REMOTE_ADDR': '127.0.0.1', 'SCRIPT_NAME': '/' + name}, **environ)
        done = subprocess.run(
            [self.site.python, self.site.file('lib/cgi-bin/' + name)],
            input=body, env=environ, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        self.assertEqual(done.stderr, b'')
        return done.stdout.decode()


class Forms(Case):

    def test_no_post_without_a_token(self):
        """Neither without one, nor with another's, nor from elsewhere."""
        browser = self.logged_in()
        token = self.token(browser)
        other = Browser(self.site)
        other.login()
        tokens = (None, token[:-1] + ('0' if token[-1] != '0' else '1'),
                  self.token(other))
        fields = {'address': 'eve@example.org', 'password': PASSWORD,
                  'new': 'evil password', 'again': 'evil password',
                  'news': 'on', 'link': 'x', 'dollars': '5'}
        before = self.state()
        for script in SCRIPTS:
            if script in STRANGERS:
                continue
            for given in tokens:
                page = browser.post(script, dict(
                    fields, **({} if given is None else {'token': given})))
                self.assertIn((script, page.status), (
                    (script, 403), (script, 405)))
            page = browser.ask(
                'POST', script, 'token=' + token, {
                    'Sec-Fetch-Site': 'cross-site', 'Content-Type':
                    'application/x-www-form-urlencoded'})
            self.assertIn(page.status, (403, 405), script)
        self.assertEqual(self.state(), before)
        self.assertEqual(browser.get('manage.cgi').status, 200)

    def token(self, browser):
        browser.go('settings.cgi')
        return Form(browser.page.text).forms[0][1]['token']

    def test_nobody_is_logged_in_by_another(self):
        """A form that another browser was given logs nobody in."""
        thief = Browser(self.site)
        thief.go('account.html')
        _, fields = Form(thief.page.text).forms[0]
        for cookies in ({}, {'visit': '0' * 32}):
            self.browser.cookies = dict(cookies)
            page = self.browser.post('manage.cgi', dict(
                fields, address=ANN, password=PASSWORD))
            self.assertEqual(page.status, 403)
            self.assertNotIn('session', self.browser.cookies)

    def test_reading_changes_nothing(self):
        browser = self.logged_in()
        browser.go('manage.cgi')
        before = self.state()
        for script in SCRIPTS:
            for method in ('GET', 'HEAD'):
                page = browser.ask(method, script)
                self.assertLess(page.status, 500, script)
        self.assertEqual(self.state(), before)
        self.assertEqual(browser.get('manage.cgi').status, 200)

    def test_other_methods(self):
        for method in ('PUT', 'DELETE', 'OPTIONS', 'TRACE', 'X'):
            page = self.browser.ask(method, 'manage.cgi')
            self.assertIn(page.status, (400, 405, 501), method)


class Cookies(Case):

    def test_attributes(self):
        self.browser.go('account.html')
        page = self.browser
        lines = list(page.page.headers.get_all('Set-Cookie'))
        _, fields = Form(page.page.text).forms[0]
        lines += page.post('manage.cgi', dict(
            fields, address=ANN, password=PASSWORD)).headers.get_all(
                'Set-Cookie')
        self.assertEqual([line.partition('=')[0] for line in lines],
                         ['visit', 'session'])
        for line in lines:
            self.assertTrue(line.endswith('; Path=/; HttpOnly; SameSite=Lax'),
                            line)

    def test_forged(self):
        browser = self.logged_in()
        good = browser.cookies['session']
        ident, secret, mac = good.split('.')
        other = self.site.account('%d@example.org' % time.time())
        for bad in ('', 'x', '..', good[:-1], good + '0', '%s.%s.%s' % (
                other, secret, mac), '%s.%s.' % (ident, secret),
                '%s.%s.%s' % (ident, '0' * 32, mac), good.upper(),
                '../%s.%s.%s' % (ident, secret, mac), good + '.' + mac,
                '\xe9.\xe9.\xe9', '%s.%s.%s' % (ident, secret, '0' * 64)):
            page = Browser(self.site).get('manage.cgi',
                                          Cookie='session=' + bad)
            self.assertEqual((bad, page.status), (bad, 303))
        self.assertEqual(browser.get('manage.cgi').status, 200)

    def test_the_store_gives_no_cookie_away(self):
        browser = self.logged_in()
        _, secret, mac = browser.cookies['session'].split('.')
        for key in self.site.server.accounts.list('session/'):
            data = key.encode() + self.site.server.accounts.get(key)
            self.assertNotIn(secret.encode(), data)
            self.assertNotIn(mac.encode(), data)

    def test_it_ends(self):
        """At its end, when its object goes, and with another password."""
        accounts = self.site.server.accounts

        def ended(browser):
            page = browser.get('manage.cgi')
            return page.status == 303

        browser = self.logged_in()
        key, = [key for key in accounts.list('session/%s/' % self.ident)
                if tarsnapd.sha256(browser.cookies['session'].split('.')[1]
                                   .encode()).hex()[:32] in key]
        value = self.site.run(tarsnapd.summed_get(key))
        for change in ({'until': int(time.time()) - 1}, {'state': 'x'},
                       {'time': int(time.time()) + 3600}):
            accounts.delete(key)
            accounts.put(key, tarsnapd.versioned_encode(
                key, dict(value, **change)))
            self.assertTrue(ended(browser), change)
        accounts.delete(key)
        accounts.put(key, tarsnapd.versioned_encode(key, value))
        self.assertFalse(ended(browser))
        found = self.site.run(tarsnapd.account_need(ANN))
        self.site.run(tarsnapd.account_password(found, PASSWORD.encode()))
        self.assertTrue(ended(browser))


class Pages(Case):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.numbers = sample(cls.site, cls.ident, 2)

    def test_headers(self):
        """On whatever comes back."""
        browser = self.logged_in()
        for path in ('', 'account.html', 'manage.cgi', 'activity.cgi',
                     'activity.cgi?format=csv', 'export.cgi', 'nothing.cgi',
                     'web.py', 'machine.cgi?mid=0', 'style.css', 'icon.svg',
                     'confirm.cgi?link=x', 'logout.cgi'):
            page = browser.get(path)
            headers = {name: page.headers.get_all(name) for name in (
                'Content-Security-Policy', 'X-Frame-Options',
                'X-Content-Type-Options', 'Referrer-Policy')}
            (policy,) = headers.pop('Content-Security-Policy')
            self.assertEqual(list(headers.values()), [
                ['DENY'], ['nosniff'], ['no-referrer']], path)
            words = policy.split('; ')
            for word in ("default-src 'none'", "frame-ancestors 'none'",
                         "base-uri 'none'"):
                self.assertIn(word, words, path)
            self.assertNotIn('unsafe', policy)
            self.assertNotIn('*', policy)
            self.assertEqual(page.headers['Server'], 'Apache')
            if path not in ('style.css', 'icon.svg') and page.status == 200:
                self.assertEqual(page.headers['Cache-Control'], 'no-store')
            self.assertNotRegex(page.text, r'(?i)<script|\son\w+=|style=')

    def test_the_host_is_not_believed(self):
        browser = self.logged_in()
        for path in ('', 'manage.cgi', 'logout.cgi', 'settings.cgi',
                     'account.html', 'nothing.cgi', 'register.cgi'):
            for headers in ({'Host': 'evil.example'},
                            {'X-Forwarded-Host': 'evil.example',
                             'Forwarded': 'host=evil.example'}):
                page = browser.ask('GET', path, None, headers)
                self.assertNotIn('evil', page.text + str(page.headers))
        other = Browser(self.site)
        other.go('forgot.cgi')
        _, fields = Form(other.page.text).forms[0]
        other.post('forgot.cgi', dict(fields, address=ANN),
                   Host='evil.example')
        self.assertTrue(self.site.link('reset-password', ANN))

    def test_no_open_redirect(self):
        browser = self.logged_in()
        for name in ('next', 'url', 'return', 'redirect', 'link', 'to'):
            for path in ('account.html', 'manage.cgi', 'address.cgi'):
                page = browser.get('%s?%s=https://evil.example/' % (
                    path, name))
                self.assertNotIn('evil', str(page.headers))
        for path in ('/evil.example', '/evil.example/..', '%5cevil.example'):
            page = browser.get(path)
            self.assertNotIn('evil', page.headers.get('Location') or '')

    def test_paths(self):
        for path in ('../web/web.conf', '%2e%2e/web/web.conf', 'manage.cgi/x',
                     '..%2fweb%2fweb.conf', 'web.cgi%00.py', 'WEB.PY',
                     'lib/tarsnapd.py', 'cgi-bin/web.py', 'web.conf'):
            page = self.browser.get(path)
            self.assertIn(page.status, (400, 403, 404), path)
            self.assertNotIn('accounts', page.text)

    def test_hostile_names(self):
        """Of machines, users, payments and browsers: shown as they are."""
        site, ident = self.site, self.site.account(NASTY[0], b'pass word')
        for i, name in enumerate(NASTY):
            site.run(tarsnapd.owner_set(i + 1, ident, name))
            site.run(tarsnapd.ledger_pay(
                ident, 'bank', 'n%d' % i, 10 ** 18, text=name))
        browser = Browser(site)
        browser.go('account.html')
        _, fields = Form(browser.page.text).forms[0]
        browser.post('manage.cgi', dict(fields, address=NASTY[0],
                                        password='pass word'),
                     **{'User-Agent': NASTY[1]})
        for path in ['manage.cgi', 'payments.cgi', 'settings.cgi',
                     'activity.cgi?view=machines',
                     'receipt.cgi?entry=bank-n0'] + [
                         'machine.cgi?mid=%016x' % (i + 1)
                         for i in range(len(NASTY))]:
            page = browser.get(path)
            self.assertEqual(page.status, 200, path)
            tags = Tags(page.text)
            self.assertLessEqual(tags.tags, TAGS, path)
            self.assertNotIn('\u202e', page.text)
        browser.go('manage.cgi')
        seen = Tags(browser.page.text).text
        for name in NASTY:
            self.assertIn(name.replace('\u202e', '?'), seen)

    def test_no_formula_in_csv(self):
        key = 'owned/%s/%s' % (self.ident, self.numbers[0])
        self.site.server.accounts.delete(key)
        self.site.run(tarsnapd.owned_put(
            self.ident, int(self.numbers[0], 16), '=1+1,"2'))
        self.addCleanup(self.site.server.accounts.delete, key)
        page = self.logged_in().get('activity.cgi?view=machines&format=csv')
        self.assertIn(',"\'=1+1,""2",', page.text)

    def test_nothing_secret_in_the_logs(self):
        browser = self.logged_in()
        secrets = [PASSWORD, 'correct+horse', browser.cookies['session'],
                   'AAAAsecretlink', 'very wrong']
        browser.get('confirm.cgi?link=AAAAsecretlink')
        browser.get('nothing.cgi?link=AAAAsecretlink',
                    Referer='http://x/?link=AAAAsecretlink')
        browser.post('manage.cgi', {'address': ANN,
                                    'password': 'very wrong'})
        browser.post('manage.cgi?password=very+wrong', {'x': 'y'})
        browser.get('manage.cgi?password=very%20wrong')
        log = self.site.log() + self.site.log('access')
        self.assertIn('GET /confirm.cgi', log)
        for secret in secrets:
            self.assertNotIn(secret, log)
            self.assertNotIn(secret.replace(' ', '+'), log)
            self.assertNotIn(secret.replace(' ', '%20'), log)

    def test_bounds(self):
        """What is too large or makes no sense is refused, in words."""
        browser = self.logged_in()
        kind = {'Content-Type': 'application/x-www-form-urlencoded'}
        for body, headers, status in (
                (b'a=' + b'x' * 70000, kind, 413),
                (b'a=' + b'x' * 5000, kind, 400),
                (b'&'.join(b'a%d=1' % i for i in range(100)), kind, 400),
                (b'a=1&a=2', kind, 400), (b'a=%ff', kind, 400),
                (b'\xff\xfe', kind, 400), (b'a=1', {}, 415),
                (b'{"a": 1}', {'Content-Type': 'application/json'}, 415),
                (b'', kind, 403), (b'a', kind, 403),
                (b'token=%00', kind, 403)):
            page = browser.ask('POST', 'news.cgi', body, headers)
            self.assertEqual((body[:20], page.status), (body[:20], status))
        for query, status in (('x' * 5000, 400), ('a=1&a=2', 400),
                              ('month=%ff', 400), ('month=2026-13', 400),
                              ('month=9999999-01', 400), ('month=%00', 400),
                              ('month=1-01', 400), ('month=0000-00', 400),
                              ('month=9999-12', 200), ('x' * 9000, 414)):
            page = browser.get('activity.cgi?' + query)
            self.assertEqual((query[:20], page.status),
                             (query[:20], status))
        page = browser.ask('POST', 'news.cgi', iter([b'a=1']), kind)
        self.assertEqual(page.status, 411)
        page = browser.get('manage.cgi', Cookie='session=' + 'x' * 8100)
        self.assertIn(page.status, (303, 400))
        self.assertNotIn('Traceback', self.site.log())

    def test_bounds_without_apache(self):
        """The scripts do not trust in what stands before them."""
        for length, status in (('70000', '413'), ('-1', '413'), ('x', '413'),
                               ('10', '400'), ('3', '303')):
            said = self.run_script(
                'news.cgi', b'a=1&a=2', REQUEST_METHOD='POST',
                CONTENT_LENGTH=length,
                CONTENT_TYPE='application/x-www-form-urlencoded')
            self.assertEqual(said[:11], 'Status: ' + status)

    def test_not_in_the_clear(self):
        """From another host only over TLS."""
        for environ, status in (({}, '403'), ({'HTTPS': 'on'}, '200')):
            said = self.run_script('account.cgi', REMOTE_ADDR='192.0.2.7',
                                   **environ)
            self.assertEqual(said[:11], 'Status: ' + status)
        self.assertIn('Strict-Transport-Security: max-age=', said)
        self.assertRegex(said, 'Set-Cookie: __Host-visit=[0-9a-f]{32}; '
                         'Path=/; HttpOnly; SameSite=Lax; Secure\r\n')


class Tags(html.parser.HTMLParser):
    """Which elements and attributes a page has, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = set(), ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.tags.update(name for name, _ in attrs
                         if name.startswith('on') or name == 'style')

    def handle_data(self, data):
        self.text += data


TAGS = set('''html head meta title link body a header nav form input p button
main h1 h2 dl div dt dd table caption thead tbody tr th td footer strong code
pre br time figure figcaption svg line text rect ul li section label small
span'''.split())


class Guessing(Case):

    def test_who_there_is_by_text(self):
        """Registering, forgetting and logging in say the same of anybody."""
        for name in ('register.cgi', 'forgot.cgi'):
            pages = []
            for address in (ANN, 'bob@example.org'):
                self.browser = Browser(self.site)
                self.browser.go(name)
                page = self.browser.send(name, address=address)
                pages.append((page.status, self.plain(page, address)))
            self.assertEqual(pages[0], pages[1])
        pages = []
        for address in (ANN, 'bob@example.org'):
            self.browser = Browser(self.site)
            page = self.browser.login(address, 'wrong')
            pages.append((page.status, self.plain(page, address)))
        self.assertEqual(pages[0], pages[1])
        self.assertEqual(pages[0][0], 403)
        self.site.mails()

    @staticmethod
    def plain(page, address):
        return re.sub('[0-9a-f]{64}', '', page.text.replace(address, '@'))

    def test_who_there_is_by_work(self):
        """Also what is read, written and computed is the same."""
        def work(act):
            done = []
            site = web.Site(self.site.web, web.Request({
                'REMOTE_ADDR': '127.0.0.1'}))
            real, scrypt = site.perform, tarsnapd.hashlib.scrypt

            def perform(wish):
                if wish[0] in tarsnapd.STORE_VERBS:
                    done.append((wish[0], wish[1].split('/')[0]))
                return real(wish)

            def slow(*args, **options):
                done.append(('scrypt', options['n'], options['r']))
                return scrypt(*args, **options)

            with mock.patch.object(site, 'perform', perform), \
                    mock.patch.object(tarsnapd.hashlib, 'scrypt', slow):
                act(site)
            site.guesses.close()
            return done

        def forgot(address):
            return work(lambda site: site.ask('reset', address))

        def login(address):
            return work(lambda site: site.login(address, 'wrong'))

        self.site.account('eve@example.org', cost=tarsnapd.SCRYPT)
        for act in (forgot, login):
            self.assertEqual(act('eve@example.org'), act('bob@example.net'))
        self.assertIn(('scrypt', 1 << 15, 8), login('eve@example.org'))
        self.assertEqual(work(lambda site: site.ask('join', ANN)),
                         work(lambda site: site.ask('join', 'b@example.net')))
        self.site.mails()

    def test_passwords_are_counted(self):
        """On the pages, by programs, and where a session is confirmed."""
        def tries(act):
            for n in range(30):
                if act('wrong').status == 429:
                    return n
            raise AssertionError('never put off')

        def page(password):
            return Browser(self.site).login(ANN, password)

        def program(password):
            return Browser(self.site).post('manage.cgi', {
                'address': ANN, 'password': password, 'action': 'activity'})

        owner = self.logged_in()

        def confirm(password):
            owner.go('settings.cgi')
            return owner.send('close.cgi', password=password)

        self.assertEqual(tries(page), 10)
        # Not even the right one, by any way, until time has passed.
        for act in (page, program, confirm):
            self.assertEqual(act(PASSWORD).status, 429)
        self.setUp()
        self.assertEqual(tries(program), 10)
        self.setUp()
        self.assertEqual(tries(confirm), 10)

    def test_mails_are_counted(self):
        for n in range(12):
            self.browser.go('forgot.cgi')
            page = self.browser.send('forgot.cgi', address='%d@x.org' % n)
            self.assertEqual(page.status, 200 if n < 10 else 429)
        self.assertEqual(self.site.mails(), [])

    def test_headers_in_an_address(self):
        self.browser.go('register.cgi')
        for address in ('a@b.org\r\nBcc: c@d.org', 'a b@c.org', '-f@',
                        '<a@b.org>', 'a@b.org,c@d.org', ''):
            self.browser.go('register.cgi')
            self.assertEqual(self.browser.send(
                'register.cgi', address=address).status, 400)
        self.assertEqual(self.site.mails(), [])


class Apart(Case):
    """The user of the pages and what is none of his business."""

    PROBE = '''#!/usr/bin/env python3
import os
print('Content-Type: text/plain\\n')
for path in %r:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path)
        print('READ', path)
    except PermissionError:
        print('refused')
for path in %r:
    if os.access(path, os.W_OK):
        print('WRITE', path)
print('done', os.getuid())
'''

    def test_what_it_can_read(self):
        """No block, no key, no configuration of the server."""
        if os.getuid() != 0:
            self.skipTest('only root can start it as another user')
        srv = self.site.srv
        self.assertTrue(os.path.exists(os.path.join(srv, 'tls.key')))
        secret = [srv] + [os.path.join(srv, name) for name in (
            'tls.key', 'identity.key', 'secret', 'tarsnapd.conf', 'store',
            'store/store-id', 'spool', 'index')]
        code = [self.site.file(name) for name in (
            'lib', 'lib/tarsnapd.py', 'lib/cgi-bin', 'lib/cgi-bin/web.py',
            'lib/cgi-bin/manage.cgi', 'httpd.conf')]
        probe = self.site.file('lib/cgi-bin/probe.cgi')
        with open(probe, 'w') as file:
            file.write(self.PROBE % (secret, code))
        os.chmod(probe, 0o755)
        try:
            page = self.browser.get('probe.cgi')
        finally:
            os.unlink(probe)
        self.assertEqual(page.text, 'refused\n' * len(secret)
                         + 'done %d\n' % self.site.user)

    def test_what_it_could_do(self):
        """Even with the rights: wishes for anything else are refused."""
        site = web.Site(self.site.web, web.Request({
            'REMOTE_ADDR': '127.0.0.1'}))
        for wish in (('get', 'store-id', 0, None), ('list', 'seg/'),
                     ('list', 'machine/'), ('put', 'log/x', b''),
                     ('delete', 'seg/x'), ('index', 1, 'state'),
                     ('spool', None, 'held', 1)):
            with self.assertRaises(tarsnapd.StoreError):
                site.perform(wish)

    def test_failures_say_nothing(self):
        """Where something is wrong the page gives nothing away."""
        os.rename(self.site.file('web/web.conf'), self.site.file('web/x'))
        try:
            page = self.browser.get('manage.cgi')
        finally:
            os.rename(self.site.file('web/x'), self.site.file('web/web.conf'))
        self.assertEqual(page.status, 503)
        self.assertNotIn('web.conf', page.text)
        self.assertIn('web.conf', self.site.log())
        self.assertEqual(self.browser.get('account.html').status, 200)


if __name__ == '__main__':
    unittest.main()
