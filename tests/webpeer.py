#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A real Apache with the account pages, on a loopback port.

`Site` makes a server directory, accounts in a directory of their own beside
it, and a copy of the sources as one installs them, and starts Apache by the
configuration in contrib/ as a user who owns nothing else: as root another
one than ours, so that what he cannot read is what the pages cannot read.
`Browser` keeps cookies, and fills in forms that it is shown.

Run as a program (`make web`) it shows a filled sample account until it is
interrupted, with a server that machines can register at; mail is printed.
"""

import collections
import html.parser
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import installed                                        # noqa: E402
import tarsnapd                                         # noqa: E402
from lab import no_fsync                                # noqa: E402
from s3peers import SECONDS, free_ports                 # noqa: E402
from tarsnapd import ATTO, DAY                          # noqa: E402

NOBODY = 65534                  # a user and group who own nothing
VALIDATOR = 'html-validate@8.29.0'
SEARCH = os.environ['PATH'] + ':/usr/sbin:/sbin'
PRICES = 'storage-price = 250\nupload-price = 250\ndownload-price = 250\n'


def python():
    """An interpreter that another user may run, too."""
    path = os.path.realpath(sys.executable)
    where = os.path.dirname(path)
    while os.getuid() == 0 and where != '/':
        if not os.stat(where).st_mode & 0o001:
            return '/usr/bin/python3'
        where = os.path.dirname(where)
    return sys.executable


def listening(port, child, log=str):
    """Wait until somebody listens there; AssertionError if `child` ends."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(('127.0.0.1', port)).close()
            return
        except OSError:
            if child.poll() is not None or time.monotonic() > end:
                raise AssertionError('%s: %s' % (child.args, log())) from None
            time.sleep(0.05)


def need(program, package):
    """The path of a program; SkipTest if it is not there."""
    found = shutil.which(program, path=SEARCH)
    if not found:
        raise unittest.SkipTest('no %s (Debian: %s)' % (program, package))
    return found


class Site:
    """Apache with the account pages: `port`, `root`, `srv`, `accounts`,
    `web`, log().

    `cleanup` is an addCleanup or addClassCleanup of unittest.  `conf` is
    appended to tarsnapd.conf, `web` to web.conf; `server` is where the pages
    say that clients go.  Unless it is `plain` it listens to stunnel alone.
    """

    def __init__(self, cleanup, conf=PRICES, web='', plain=True,
                 server='backup.example.org:9279'):
        self.apache = need('apache2', 'apache2-bin')
        self.user = NOBODY if os.getuid() == 0 else os.getuid()
        base = tempfile.TemporaryDirectory(prefix='web-', dir='/tmp')
        cleanup(base.cleanup)
        self.root = base.name
        os.chmod(self.root, 0o755)
        self.srv, self.accounts, self.web = (
            os.path.join(self.root, name) for name in (
                'srv', 'accounts', 'web'))
        self.port, = free_ports(1)
        self.url = 'http://127.0.0.1:%d/' % self.port
        self._server(conf)
        self._install('server = %s\n%s' % (server, web))
        self.child, self.plain = None, plain
        cleanup(self.close)
        self.start()

    def _server(self, conf):
        os.mkdir(self.accounts)
        os.chown(self.accounts, -1, self.user if os.getuid() == 0 else -1)
        os.chmod(self.accounts, 0o2770)
        tarsnapd.server_create(self.srv, {'listen': '127.0.0.1:9279',
                                          'accounts': self.accounts})
        tarsnapd.certificate_renew(self.srv)
        with open(os.path.join(self.srv, 'tarsnapd.conf'), 'a') as file:
            file.write('mail-from = Sample Backups <backup@example.org>\n'
                       'web-url = %sconfirm.cgi\n%s' % (self.url, conf))
        self.server = tarsnapd.Server(self.srv)
        self.server.run(tarsnapd.decoys_make())
        self.server.run(tarsnapd.site_put(self.server.facts()))

    def _install(self, web):
        """Copy the sources, and compile them as their user cannot."""
        lib, self.python = os.path.join(self.root, 'lib'), python()
        shutil.copytree(os.path.join(ROOT, 'cgi-bin'),
                        os.path.join(lib, 'cgi-bin'),
                        ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(os.path.join(ROOT, 'tarsnapd.py'), lib)
        for name in os.listdir(os.path.join(lib, 'cgi-bin')):
            os.chmod(os.path.join(lib, 'cgi-bin', name),
                     0o755 if name.endswith('.cgi') else 0o644)
        subprocess.run([self.python, '-m', 'compileall', '-q', lib],
                       check=True)
        for name in ('web', 'run', 'log'):
            path = os.path.join(self.root, name)
            os.mkdir(path, 0o700)
            os.chown(path, self.user, -1)
        os.mkdir(os.path.join(self.root, 'bin'), 0o755)
        os.symlink(self.python, os.path.join(self.root, 'bin', 'python3'))
        with open(os.path.join(self.web, 'web.conf'), 'w') as file:
            file.write('[web]\naccounts = %s\n%s' % (self.accounts, web))
        os.chown(file.name, self.user, -1)
        os.chmod(file.name, 0o600)

    def start(self, *more):
        """Start Apache by the files in contrib/; wait until it answers."""
        argv = [self.apache, '-DFOREGROUND', '-f', self.file('httpd.conf')]
        argv += ['-DWEB_PLAIN'] if self.plain else []
        for name in ('httpd', 'site'):
            source = 'tarsnap-web%s.conf' % {'httpd': '-httpd'}.get(name, '')
            shutil.copy(os.path.join(ROOT, 'contrib', source),
                        os.path.join(self.root, name + '.conf'))
        for name, value in (
                ('LISTEN', '127.0.0.1:%d' % self.port),
                ('RUN', self.file('run')), ('LOG', self.file('log')),
                ('SITE', self.file('site.conf')),
                ('CGI', self.file('lib/cgi-bin')), ('DIR', self.web),
                ('PATH', self.file('bin') + ':/usr/bin:/bin')):
            argv += ['-C', 'Define WEB_%s %s' % (name, value)]
        if os.getuid() == 0:
            argv[:0] = ['setpriv', '--reuid', str(self.user), '--regid',
                        str(self.user), '--clear-groups']
        self.child = subprocess.Popen(
            argv + list(more), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd='/',
            env={'PATH': SEARCH})
        listening(self.port, self.child, self.log)

    def file(self, name):
        return os.path.join(self.root, name)

    def log(self, name='error'):
        try:
            with open(self.file('log/%s.log' % name)) as file:
                return file.read()
        except FileNotFoundError:
            return ''

    def run(self, steps):
        return self.server.run(steps)

    def account(self, address='ann@example.org', password=b'correct horse',
                cost=(10, 8, 1)):
        """A new account; its id.  At less than the usual `cost` its logins
        take no time.
        """
        with mock.patch.object(tarsnapd, 'SCRYPT', cost):
            return self.run(tarsnapd.account_create(address, password))

    def mails(self):
        """[(kind, to, values)] that are to go out; taken as sent."""
        self.run(tarsnapd.asks_answer(self.server.post))
        found = []
        for name, mail, done in self.run(tarsnapd.mail_list()):
            if not done:
                self.run(tarsnapd.mail_end(name, mail))
                found.append((mail['kind'], mail['to'], mail['values']))
        return found

    def link(self, kind, to):
        """Where the only mail there is leads, below the site."""
        (kind_is, to_is, values), = self.mails()
        assert (kind_is, to_is) == (kind, to), (kind_is, to_is)
        assert values['link'].startswith(self.url), values
        return values['link'][len(self.url):]

    def stop(self):
        if self.child:
            self.child.terminate()
            self.child.wait(SECONDS)
            self.child.stderr.close()
            self.child = None

    def close(self):
        self.stop()
        self.server.close()


def validate(texts):
    """What the validator has to say of pages; '' if nothing."""
    program = os.path.join(installed.npm(VALIDATOR), '.bin', 'html-validate')
    with tempfile.TemporaryDirectory() as base:
        for i, text in enumerate(texts):
            with open(os.path.join(base, '%d.html' % i), 'w') as file:
                file.write(text)
        with open(os.path.join(base, '.htmlvalidate.json'), 'w') as file:
            file.write('{"extends": ["html-validate:recommended"], '
                       '"root": true}')
        done = subprocess.run([program, base], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
    return done.stdout or done.returncode or ''


class Form(html.parser.HTMLParser):
    """The forms of a page: [(action, {name: value})]."""

    def __init__(self, text):
        super().__init__()
        self.forms = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'form':
            self.forms.append((attrs['action'], {}))
        elif tag in ('input', 'button', 'select') and attrs.get('name'):
            self.forms[-1][1][attrs['name']] = attrs.get('value') or ''


Page = collections.namedtuple('Page', 'status headers text')


class Browser:
    """Keeps cookies.  get() and post() return a Page and follow nothing;
    go() follows, and send() fills in a form of the last page.
    """

    def __init__(self, site):
        self.site = site
        self.cookies = {}
        self.page = None
        self.here = ''

    def connect(self):
        return http.client.HTTPConnection('127.0.0.1', self.site.port,
                                          timeout=SECONDS)

    def ask(self, method, path, body=None, headers=()):
        connection = self.connect()
        headers = dict(headers)
        if self.cookies:
            headers.setdefault('Cookie', '; '.join(
                '%s=%s' % pair for pair in self.cookies.items()))
        try:
            connection.request(method, '/' + path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode('utf-8')
        finally:
            connection.close()
        for line in answer.headers.get_all('Set-Cookie', ()):
            name, _, value = line.partition(';')[0].partition('=')
            self.cookies[name] = value
            if not value:
                del self.cookies[name]
        self.page, self.here = Page(answer.status, answer.headers,
                                    text), path
        return self.page

    def get(self, path, **headers):
        return self.ask('GET', path, None, headers)

    def post(self, path, fields, **headers):
        headers.setdefault('Content-Type',
                           'application/x-www-form-urlencoded')
        return self.ask('POST', path, urllib.parse.urlencode(fields),
                        headers)

    def follow(self):
        while self.page.status == 303 and (
                '://' not in self.page.headers['Location']):
            self.get(self.page.headers['Location'])
        return self.page

    def go(self, path):
        self.get(path)
        return self.follow()

    def send(self, action, **fields):
        """Fill in and send the form of the page that goes to `action`."""
        for there, values in Form(self.page.text).forms:
            if there == action:
                self.post(action, dict(values, **fields))
                return self.follow()
        raise AssertionError('no form %s in %s' % (action, self.page.text))

    def login(self, address='ann@example.org', password='correct horse'):
        self.go('account.html')
        return self.send('manage.cgi', address=address, password=password)


def sample(site, ident, days, machines=3, until=None):
    """Give an account `machines` and `days` of usage up to yesterday, or to
    day `until`: written as ledger objects, as `bill` writes them.
    """
    store, now = site.server, int(time.time())
    last = now // DAY - 1 if until is None else until
    start = last - days + 1
    store.run(tarsnapd.start_make(start))
    names = ('www1.example.org', 'mail', 'laptop', 'db-replica')
    numbers = ['%016x' % (0x1a2b3c4d5e6f7081 * (i + 1) % (1 << 64))
               for i in range(machines)]
    for i, number in enumerate(numbers):
        store.run(tarsnapd.owner_set(
            int(number, 16), ident, names[i] if i < 4 else 'host%d' % i))
    prices = store.prices or tarsnapd.Prices(0, 0, 0)
    size = [2 * 10 ** 9 * (i + 1) for i in range(machines)]
    for day in range(start, last + 1):
        usages = {shard: tarsnapd.Usage(day, shard, prices._replace(
            storage=tarsnapd.price_of_day(prices.storage, day)))
            for shard in tarsnapd.SHARDS}
        for i, number in enumerate(numbers):
            up = 10 ** 7 * (1 + (day * (i + 3)) % 5) if (
                i != 2 or day < last - 12) else 0
            size[i] += up // 2
            usages[number[0]].rows[number] = tarsnapd.Used(
                ident, day - start + 1, size[i], size[i], up,
                10 ** 8 if (day + i) % 11 == 0 else 0)
        with no_fsync():
            for usage in usages.values():
                store.perform(('put', usage.key(), usage.encode()))
    return numbers


def pay(site, ident, reference, dollars, kind='payment'):
    site.run(tarsnapd.ledger_pay(ident, 'bank', reference, dollars * ATTO,
                                 kind))


MAIL = '''#!/bin/sh
{ echo; sed 's/^/    /'; } >>%s
'''


def show():
    """A site with a sample account, until it is interrupted."""
    import contextlib
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        port, = free_ports(1)
        address, base = '127.0.0.1:%d' % port, tempfile.mkdtemp()
        stack.callback(shutil.rmtree, base)
        box, program = (os.path.join(base, name) for name in ('box', 'mail'))
        with open(program, 'w') as file:
            file.write(MAIL % box)
        os.chmod(program, 0o755)
        open(box, 'w').close()
        keys = 'pay-keys = pay.keys\n' if shutil.which('npm') else ''
        site = Site(stack.callback, PRICES + 'mail-sendmail = %s\n' % program
                    + keys, keys, server=address)
        if keys:
            import paypeer
            paypeer.Emulate(stack.callback, site.url + 'stripe.cgi').keys(
                (site.web, site.user), (site.srv, os.getuid()))
        serve = subprocess.Popen([
            sys.executable, os.path.join(ROOT, 'tarsnapd.py'), 'serve',
            site.srv, '--listen', address])
        stack.callback(serve.wait)
        stack.callback(serve.terminate)
        ident = site.account()
        sample(site, ident, 60)
        pay(site, ident, '2026-0711', 20)
        print('The account pages are at %s\nlog in as ann@example.org with '
              'the password "correct horse".\nMail that is sent is shown '
              'here%s.  Control-C ends it.' % (site.url, keys and (
                  '; money is paid to a double of Stripe')), flush=True)
        with open(box) as file:
            while site.child.poll() is None:
                tarsnapd.mail_run(site.server, print)
                print(file.read(), end='', flush=True)
                time.sleep(1)


if __name__ == '__main__':
    try:
        show()
    except KeyboardInterrupt:
        pass
    except unittest.SkipTest as e:
        sys.exit(str(e))
