#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What lies around the account pages: stunnel in front of their Apache, the
rotation of its logs and its unit, by the real programs.
"""

import http.client
import os
import pwd
import re
import socket
import ssl
import subprocess
import time
import unittest

import s3peers
import webpeer
from test_contrib_server import CONTRIB, read
from webpeer import Browser, Site


class Secure(Browser):
    """Comes over TLS, from an address of its own."""

    def connect(self):
        context = ssl.create_default_context(cafile=self.site.pem)
        return http.client.HTTPSConnection(
            'localhost', self.site.front, timeout=s3peers.SECONDS,
            context=context, source_address=('127.0.0.9', 0))


class Front(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.site = Site(cls.addClassCleanup, plain=False)
        cls.site.account()
        cls.site.pem = cls.site.file('front.pem')
        s3peers.certificate(cls.site.pem)
        os.chmod(cls.site.pem, 0o600)
        cls.site.front, = s3peers.free_ports(1)
        text = read('tarsnap-web-stunnel.conf')
        for option, value in (
                ('accept', '127.0.0.1:%d' % cls.site.front),
                ('connect', '127.0.0.1:%d' % cls.site.port),
                ('cert', cls.site.pem),
                ('pid', cls.site.file('pids/stunnel.pid'))):
            text, count = re.subn('(?m)^%s = .*$' % option,
                                  '%s = %s' % (option, value), text)
            assert count == 1, option
        os.mkdir(cls.site.file('pids'))
        if os.getuid() == 0:
            os.chown(cls.site.file('pids'),
                     pwd.getpwnam('stunnel4').pw_uid, -1)
        else:
            text = re.sub('(?m)^set[ug]id = .*\n', '', text)
        with open(cls.site.file('stunnel.conf'), 'w') as file:
            file.write('foreground = yes\n' + text)
        program = webpeer.need('stunnel4', 'stunnel4')
        child = subprocess.Popen([program, file.name],
                                 stdin=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        cls.addClassCleanup(child.wait)
        cls.addClassCleanup(child.kill)
        webpeer.listening(cls.site.front, child)
        assert os.path.exists(cls.site.file('pids/stunnel.pid'))

    def test_logged_in_over_tls(self):
        """Cookies are for TLS alone, and the client's address arrives."""
        browser = Secure(self.site)
        page = browser.login()
        self.assertEqual((page.status, browser.here), (200, 'manage.cgi'))
        self.assertEqual(sorted(browser.cookies), ['__Host-session',
                                                   '__Host-visit'])
        self.assertTrue(page.headers['Strict-Transport-Security'])
        self.assertIn('127.0.0.9', browser.go('settings.cgi').text)
        end = time.monotonic() + s3peers.SECONDS
        while 'settings' not in self.site.log('access') \
                and time.monotonic() < end:     # written once it is answered
            time.sleep(0.05)
        self.assertRegex(self.site.log('access'),
                         r'(?m)^127\.0\.0\.9 .*"GET /settings\.cgi ')

    def test_a_cookie_without_its_prefix(self):
        """What a page of another host could set counts for nothing."""
        browser = Secure(self.site)
        browser.login()
        browser.cookies = {name.replace('__Host-', ''): value
                           for name, value in browser.cookies.items()}
        browser.go('manage.cgi')
        self.assertEqual(browser.here, 'account.html')

    def test_past_the_front(self):
        """Apache takes no connection that stunnel does not speak for."""
        for head in (b'', b'PROXY x\r\n'):
            with socket.create_connection(
                    ('127.0.0.1', self.site.port)) as sock:
                sock.sendall(head + b'GET /account.html HTTP/1.0\r\n\r\n')
                sock.settimeout(s3peers.SECONDS)
                try:
                    said = sock.recv(4096)
                except ConnectionResetError:
                    said = b''
            self.assertNotIn(b'200', said[:20])

    def test_logs_are_rotated(self):
        program = webpeer.need('logrotate', 'logrotate')
        site, text = self.site, read('tarsnap-web.logrotate')
        text = text.replace('/var/log/tarsnap-web', site.file('log')).replace(
            '/run/tarsnap-web', site.file('run'))
        text = re.sub('(?m)^ +su .*\n', '', text)
        conf = site.file('logrotate.conf')
        with open(conf, 'w') as file:
            file.write(text)
        os.chmod(conf, 0o644)
        Secure(site).get('account.html')
        before = site.log('access')
        argv = [program, '--force', '--state', site.file('run/state'), conf]
        if os.getuid() == 0:
            argv[:0] = ['setpriv', '--reuid', str(site.user), '--regid',
                        str(site.user), '--clear-groups']
        done = subprocess.run(argv, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, ''))
        with open(site.file('log/access.log.1')) as file:
            self.assertTrue(file.read().startswith(before))
        end = time.monotonic() + s3peers.SECONDS
        while '/account.html' not in site.log('access'):
            self.assertLess(time.monotonic(), end)
            Secure(site).get('account.html')
            time.sleep(0.1)


    def test_in_an_apache_that_is_there(self):
        """The directives for a <VirtualHost> are no others."""
        site = self.site
        with open(site.file('vhost.conf'), 'w') as file:
            file.write('ServerRoot "%s"\nServerName localhost\n'
                       'Listen 127.0.0.1:9\nErrorLog vhost.log\n'
                       % site.root)
            for line in read('tarsnap-web-httpd.conf').splitlines():
                if line.startswith(('LoadModule', 'TypesConfig')):
                    file.write(line.replace(
                        '${WEB_MODULES}', '/usr/lib/apache2/modules') + '\n')
            for name in ('CGI', 'DIR', 'PATH'):
                file.write('Define WEB_%s /usr\n' % name)
            file.write('<VirtualHost *:9>\nSetEnv HTTPS on\n'
                       'Include "%s"\n</VirtualHost>\n'
                       % site.file('site.conf'))
        done = subprocess.run([site.apache, '-t', '-f', file.name],
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, 'Syntax OK\n'))


class Unit(unittest.TestCase):

    def analyze(self, *words):
        program = webpeer.need('systemd-analyze', 'systemd')
        done = subprocess.run([program, *words], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout[-2000:])
        return done.stdout

    def test_unit(self):
        path = os.path.join(CONTRIB, 'tarsnap-web.service')
        self.assertEqual(self.analyze('verify', '--man=no', path), '')
        self.analyze('security', '--offline=true', '--threshold=20',
                     '--no-pager', path)


if __name__ == '__main__':
    unittest.main()
