#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A real browser, headless Chromium, driven by the WebDriver protocol.

`Chromium` starts Debian's chromedriver on a port of its own choosing, in a
directory that is removed again; nothing of it is asked but what is here:
https://www.w3.org/TR/webdriver2/.

Run as a program (`make shots SHOTS=DIR`) it takes a picture of each page of
the sample account, as on a desktop, on a phone, in the dark and on paper.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

from s3peers import SECONDS

ELEMENT = 'element-6066-11e4-a52e-4f735466cecf'     # of the protocol
ENTER = '\ue007'
QUIET = ['--headless=new', '--disable-gpu', '--disable-quic',
         '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync',
         '--disable-dev-shm-usage']


class Wrong(Exception):
    """What the driver says of a command that it could not do."""


class Chromium:
    """A browser: go(), find(), texts(), fill(), click(), shot().

    `cleanup` is an addCleanup or addClassCleanup of unittest; `size` is that
    of the window in pixels, `phone` that of a screen to pretend.
    """

    def __init__(self, cleanup, size=(1100, 900), phone=None):
        self.root = tempfile.mkdtemp(prefix='chromium-')
        cleanup(shutil.rmtree, self.root, True)
        self.driver = subprocess.Popen(
            ['chromedriver', '--port=0', '--allowed-ips='],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
            env=dict(os.environ, HOME=self.root, TMPDIR=self.root))
        cleanup(self.close)
        self.base = 'http://127.0.0.1:%d/session' % self._port()
        words = QUIET + ['--window-size=%d,%d' % size,
                         '--user-data-dir=' + os.path.join(self.root, 'user')]
        if os.getuid() == 0:
            words.append('--no-sandbox')    # Chromium has none as root
        options = {'args': words}
        if phone:
            options['mobileEmulation'] = {'deviceMetrics': {
                'width': phone[0], 'height': phone[1], 'pixelRatio': 2.0}}
        found = self.ask('POST', '', {'capabilities': {'alwaysMatch': {
            'goog:chromeOptions': options,
            'goog:loggingPrefs': {'browser': 'ALL'}}}})
        self.base += '/' + found['sessionId']

    def _port(self):
        for line in self.driver.stdout:
            found = re.search(r'started successfully on port (\d+)', line)
            if found:
                return int(found[1])
        raise AssertionError('chromedriver ended with %s' %
                             self.driver.wait())

    def ask(self, method, path, body=None):
        """A command of the protocol; its value."""
        data = None if method != 'POST' else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + path, data, {
            'Content-Type': 'application/json'}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)['value']
        except urllib.error.HTTPError as e:
            with e:
                raise Wrong(json.load(e)['value']['message']) from None

    # What is shown.

    def go(self, url):
        self.ask('POST', '/url', {'url': url})

    @property
    def url(self):
        return self.ask('GET', '/url')

    @property
    def text(self):
        """The words of the page, as one sees them."""
        return self.ask('GET', '/element/%s/text' % self.find('body'))

    def find(self, css):
        """The first element that a selector finds."""
        return self.ask('POST', '/element', {
            'using': 'css selector', 'value': css})[ELEMENT]

    def texts(self, css):
        return [self.ask('GET', '/element/%s/text' % one[ELEMENT])
                for one in self.ask('POST', '/elements', {
                    'using': 'css selector', 'value': css})]

    def script(self, text):
        return self.ask('POST', '/execute/sync', {'script': text, 'args': []})

    def cookies(self):
        """Those of this page: [{'name', 'value', 'httpOnly', ...}]."""
        return self.ask('GET', '/cookie')

    def complaints(self):
        """What its console has said since it was asked last."""
        return [line['message'] for line in self.ask(
            'POST', '/se/log', {'type': 'browser'})]

    def wait(self, test):
        """The first true value of test()."""
        end = time.monotonic() + SECONDS
        while True:
            found = test()
            if found:
                return found
            if time.monotonic() > end:
                raise AssertionError('%s shows: %s' % (self.url, self.text))
            time.sleep(0.05)

    # What is done.

    def fill(self, **fields):
        """Type into fields by their names."""
        for name, value in fields.items():
            there = '/element/' + self.find('[name="%s"]' % name)
            self.ask('POST', there + '/clear')
            self.ask('POST', there + '/value', {'text': value})

    def click(self, css):
        """Click on it, and wait until another page is there."""
        old = self.find('html')
        self.ask('POST', '/element/%s/click' % self.find(css))
        self.gone(old)

    def follow(self, words):
        """Click on the link of those words."""
        old = self.find('html')
        there = self.ask('POST', '/element', {
            'using': 'link text', 'value': words})[ELEMENT]
        self.ask('POST', '/element/%s/click' % there)
        self.gone(old)

    def press(self, keys):
        """Keys for whatever has the focus."""
        there = self.ask('GET', '/element/active')[ELEMENT]
        self.ask('POST', '/element/%s/value' % there, {'text': keys})

    def gone(self, element):
        """Wait until an element is that of a page before."""
        def test():
            try:
                self.ask('GET', '/element/%s/name' % element)
            except Wrong:
                return True
            return False
        self.wait(test)

    def emulate(self, **features):
        """Media features, such as prefers_color_scheme='dark'; '' ends."""
        self.ask('POST', '/goog/cdp/execute', {
            'cmd': 'Emulation.setEmulatedMedia', 'params': {'features': [
                {'name': name.replace('_', '-'), 'value': value}
                for name, value in features.items()]}})

    def shot(self, path):
        """Write a picture of the whole page."""
        size = self.script('return [document.documentElement.clientWidth, '
                           'document.documentElement.scrollHeight]')
        found = self.ask('POST', '/goog/cdp/execute', {
            'cmd': 'Page.captureScreenshot', 'params': {
                'captureBeyondViewport': True, 'format': 'png',
                'clip': {'x': 0, 'y': 0, 'width': size[0], 'height': size[1],
                         'scale': 1}}})
        with open(path, 'wb') as file:
            file.write(base64.b64decode(found['data']))

    def paper(self, path):
        """Write what a printer would get, a PDF."""
        with open(path, 'wb') as file:
            file.write(base64.b64decode(self.ask('POST', '/print')))

    def close(self):
        try:
            if self.driver.poll() is None:
                self.ask('DELETE', '')
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.driver.stdout.close()


# Pages of an account, before and after one has logged in.
OUTSIDE = ['index.cgi', 'register.cgi', 'account.html', 'forgot.cgi']
INSIDE = ['manage.cgi', 'activity.cgi', 'payments.cgi', 'pay.cgi',
          'settings.cgi']


def names(url):
    return os.path.splitext(urllib.parse.urlsplit(url).path[1:])[0]


def pictures(site, where):
    """Take a picture of each page into `where`: NAME-LOOK.png."""
    import contextlib
    for look, how in (('desktop', {}), ('phone', {'phone': (390, 844)})):
        with contextlib.ExitStack() as stack:
            browser = Chromium(stack.callback, **how)

            def take(pages, look=look, browser=browser):
                for page in pages:
                    browser.go(page if '://' in page else site.url + page)
                    browser.shot(os.path.join(where, '%s-%s.png' % (
                        names(browser.url), look)))
            take(OUTSIDE)
            browser.go(site.url + 'account.html')
            browser.fill(address='ann@example.org',
                         password='correct horse')
            browser.click('main button')
            machine = browser.script(
                'return document.querySelector("a[href*=\'machine\']").href')
            take(INSIDE + [machine])
            browser.go(site.url + 'payments.cgi')
            take([browser.script('return document.querySelector('
                                 '"a[href*=\'receipt\']").href')])
            if look == 'desktop':
                browser.paper(os.path.join(where, 'receipt.pdf'))
                browser.emulate(prefers_color_scheme='dark')
                take(['manage.cgi'], look='dark')
                take(['activity.cgi'], look='dark')


def main(where):
    import contextlib
    import paypeer
    import webpeer
    os.makedirs(where, exist_ok=True)
    keys = 'pay-keys = pay.keys\n'
    with contextlib.ExitStack() as stack:
        site = webpeer.Site(stack.callback, webpeer.PRICES + keys, keys)
        paypeer.Fake(stack.callback).keys(
            os.path.join(site.web, 'pay.keys'), site.user)
        ident = site.account()
        webpeer.sample(site, ident, 60)
        webpeer.pay(site, ident, '2026-0711', 20)
        pictures(site, where)


if __name__ == '__main__':
    main(sys.argv[1])
