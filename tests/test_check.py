# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""`tarsnapd check`: what a monitor is told of a server that works, and of one
that is dead, slow, silent, full, read-only, damaged or somebody else's; and
that a check leaves nothing behind.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

from rawclient import (
    PROGRAM, Client, D, Embedded, Host, R, Serve, W, here, server_directory,
    tarsnapd)

OK, WARNING, CRITICAL, UNKNOWN = range(4)
LINE = re.compile(r'\Atarsnapd (OK|WARNING|CRITICAL|UNKNOWN) - [^\n]+\n\Z')


class Case(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.key = os.path.join(self.path, 'canary.key')
        self.serve = None

    def start(self, *options):
        self.serve = Serve(self.path, *options)
        self.addCleanup(self.serve.kill)
        self.address = '127.0.0.1:%d' % self.serve.port

    def check(self, status, *words, says='', address=None):
        """A check at the server's address, and what it must come to."""
        return self.told(here('check', self.path, '--disk', '1', '--server',
                              address or self.address, *words), status, says)

    def told(self, done, status, says=''):
        self.assertEqual((done[0], done[2]), (status, ''), done)
        self.assertRegex(done[1], LINE)
        self.assertIn(says, done[1])
        return done[1]

    def canary(self):
        """The server's canary, for what a check does not do."""
        return tarsnapd.Canary(tarsnapd.canary_load(self.key), self.address,
                               30)

    def figures(self):
        found = json.loads(here('stats', self.path, '--json')[1])
        return [found[name] for name in ('machines', 'archives', 'blocks',
                                         'bytes')]


class Works(Case):

    def test_one_line_with_figures(self):
        self.start()
        line = self.check(OK, says='wrote, read and deleted a block')
        self.assertRegex(line, r' in \d+\.\d{3} s\|time=\d+\.\d{3}s;10;60;0 '
                         r'connect=\S+s read=\S+s write=\S+s delete=\S+s\n')
        self.assertEqual(stat.S_IMODE(os.stat(self.key).st_mode), 0o600)
        line = self.check(OK, '--read', says=': read a block in ')
        self.assertNotIn('write=', line)

    def test_nothing_is_left_but_one_block(self):
        self.start()
        self.check(OK)
        before = self.figures()
        self.assertEqual(before[:3], [1, 1, 1])
        for _ in range(3):
            self.check(OK)
        self.assertEqual(self.figures(), before)
        spool = os.path.join(self.path, 'spool')
        self.assertEqual([x for _, _, names in os.walk(spool) for x in names],
                         [])
        for _ in range(2):
            here('clean', self.path, '--used', '99')
        found = json.loads(here('stats', self.path, '--json')[1])
        # Lists of what was deleted wait for more of their kind.
        self.assertLess(found['segment_bytes'], 1.2 * found['bytes'])
        self.assertEqual((found['dropped'], found['orphans']), (0, 0))
        self.check(OK, '--read')

    def test_with_read_only_what_is_stored_is_not_changed(self):
        self.start()
        self.check(CRITICAL, '--read', says='nothing is stored to be read')
        self.check(OK)
        number = '%016x' % tarsnapd.canary_load(self.key).machine
        before = here('index-dump', self.path, number)
        self.check(OK, '--read')
        self.assertEqual(here('index-dump', self.path, number), before)

    def test_from_another_host_with_the_program_and_the_key(self):
        self.start('--workers', '2')
        self.check(OK)
        bare = tempfile.mkdtemp(prefix='bare-')
        self.addCleanup(shutil.rmtree, bare)
        for path in (PROGRAM, self.key):
            shutil.copy(path, bare)
        done = subprocess.run(
            [sys.executable, '-I', os.path.join(bare, 'tarsnapd.py'), 'check',
             '--server', self.address, '--key', 'canary.key'], cwd=bare,
            capture_output=True, text=True)
        self.told((done.returncode, done.stdout, done.stderr), OK)
        self.assertEqual(sorted(os.listdir(bare)),
                         ['canary.key', 'tarsnapd.py'])

    def test_many_at_once(self):
        self.start()
        self.check(OK)
        running = [subprocess.Popen(
            [sys.executable, PROGRAM, 'check', self.path, '--server',
             self.address], stdout=subprocess.PIPE, text=True)
            for _ in range(4)]
        for one in running:
            said = one.communicate()[0]
            self.assertEqual(one.returncode, OK, said)
        self.assertEqual(self.figures()[:3], [1, 1, 1])

    def test_what_a_killed_check_left_goes(self):
        self.start()
        self.check(OK)
        killed = self.canary()
        killed.list()
        killed.write(bytes(32))
        killed.begin(tarsnapd.KIND_WRITE)
        killed.close()
        self.check(OK)
        # It may be another one's that is not finished.
        self.assertEqual(self.figures()[1], 2)
        with mock.patch.object(tarsnapd, 'CANARY_OLD', -1):
            tarsnapd.canary_run(tarsnapd.canary_load(self.key), self.address,
                                30)
        self.assertEqual(self.figures()[1], 1)

    def test_the_address_is_that_of_the_configuration(self):
        with contextlib.closing(socket.create_server(
                ('127.0.0.1', 0))) as sock:
            port = sock.getsockname()[1]
        conf = os.path.join(self.path, 'tarsnapd.conf')
        self.start('--listen', '127.0.0.1:%d' % port)
        for listen in ('127.0.0.1:%d', '[::]:%d', '0.0.0.0:%d'):
            with open(conf, 'w') as file:
                file.write('[server]\nlisten = %s\n' % (listen % port))
            self.told(here('check', self.path), OK, ':%d: wrote' % port)


class Fails(Case):

    def setUp(self):
        super().setUp()
        self.start()
        self.check(OK)

    def test_dead(self):
        self.serve.stop()
        self.check(CRITICAL, says=self.address + ': Connection refused')

    def test_read_only(self):
        self.serve.stop()
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('read-only = yes\n')
        self.start()
        self.check(CRITICAL, says='read-only: what is stored can be read')
        self.check(OK, '--read')

    def test_full(self):
        number = '%016x' % tarsnapd.canary_load(self.key).machine
        here('machine', self.path, 'quota', number, '17k')
        self.check(CRITICAL, says='refused: quota of the machine is 17000')
        self.check(OK, '--read')
        here('machine', self.path, 'quota', number, 'none')
        self.check(OK)

    def test_frozen(self):
        number = '%016x' % tarsnapd.canary_load(self.key).machine
        here('machine', self.path, 'freeze', number, 'w')
        self.check(CRITICAL, says='frozen the role w')

    def test_damaged(self):
        segment = [os.path.join(top, name) for top, _, names in os.walk(
            os.path.join(self.path, 'store', 'seg')) for name in names]
        path = max(segment, key=os.path.getsize)
        # The resident is the first block that was stored.
        path = min((x for x in segment if os.path.getsize(x) > 16000),
                   key=os.path.getmtime)
        with open(path, 'rb') as file:
            good = file.read()
        with open(path, 'wb') as file:
            file.write(good[:9000] + bytes([good[9000] ^ 1]) + good[9001:])
        self.check(CRITICAL, says='a block that was stored is damaged')
        os.unlink(path)
        self.check(CRITICAL, '--read',
                   says='a block that was stored cannot be read')
        with open(path, 'wb') as file:
            file.write(good)
        self.check(OK)

    def test_a_log_that_is_damaged(self):
        base = os.path.join(self.path, 'store', 'log')
        paths = sorted(os.path.join(top, name) for top, _, names in
                       os.walk(base) for name in names)
        self.serve.stop()
        shutil.rmtree(os.path.join(self.path, 'index'))
        os.mkdir(os.path.join(self.path, 'index'), 0o700)
        with open(paths[0], 'r+b') as file:
            file.seek(60)
            file.write(b'????')
        self.start()
        # What can be read still is; but nobody can store a backup.
        self.check(CRITICAL, says='read-only: what is stored can be read')

    def test_somebody_else(self):
        other = server_directory(self)
        serve = Serve(other)
        self.addCleanup(serve.kill)
        self.check(CRITICAL, address='127.0.0.1:%d' % serve.port,
                   says='another server than the canary\'s')
        # One with the same identity and another store.
        serve.stop()
        shutil.copy(os.path.join(self.path, 'identity.key'), other)
        serve = Serve(other)
        self.addCleanup(serve.kill)
        self.check(CRITICAL, address='127.0.0.1:%d' % serve.port,
                   says='another store than the canary\'s')

    def talker(self, talk):
        """The address of something that does talk(socket)."""
        listener = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(listener.close)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    sock = listener.accept()[0]
                    threading.Thread(target=talk, args=(sock,),
                                     daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return '127.0.0.1:%d' % listener.getsockname()[1]

    def test_silent_or_no_server_of_ours(self):
        held = []
        self.check(CRITICAL, '--timeout', '1', says='no answer in 1 seconds',
                   address=self.talker(held.append))

        def http(sock):
            with sock:
                sock.recv(1000)
                sock.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')

        self.check(CRITICAL, address=self.talker(http))
        for sock in held:
            sock.close()

    def test_slow(self):
        def relay(sock):
            with sock, socket.create_connection(
                    ('127.0.0.1', self.serve.port)) as peer:
                time.sleep(1.2)
                back = threading.Thread(target=pump, args=(peer, sock))
                back.start()
                pump(sock, peer)
                back.join()

        def pump(source, target):
            with contextlib.suppress(OSError):
                while True:
                    data = source.recv(65536)
                    if not data:
                        break
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        self.check(WARNING, '--warn', '1', address=self.talker(relay))

    def test_unknown(self):
        bad = os.path.join(self.path, 'bad')
        with open(bad, 'w') as file:
            file.write('{"machine": 5}')
        for words, says in (
                ([], 'or --server and --key'),
                (['/nonexistent'], 'not a server directory'),
                ([self.path, '--key', '/nonexistent/key'], 'No such file'),
                ([self.path, '--key', bad], 'not the key of a canary'),
                ([self.path, '--server', 'host'], 'host is not HOST:PORT'),
                ([self.path, '--server', 'h:99999'], 'is not HOST:PORT'),
                ([self.path, '--warn', '0'], '--warn must be'),
                ([self.path, '--odd'], 'unknown option')):
            with self.subTest(words):
                self.told(here('check', *words), UNKNOWN, says)
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('front-certificate = tls.crt\n')
        self.told(here('check', self.path), UNKNOWN, 'is behind a front')


class Directory(Case):
    """What only shows where the server directory is."""

    def setUp(self):
        super().setUp()
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('storage-price = 250\nupload-price = 250\n'
                       'download-price = 250\nmail-from = a@example.org\n'
                       'scrub-rate = 1M\n')
        self.server = tarsnapd.Server(self.path)
        self.addCleanup(self.server.close)
        self.now = int(time.time())

    def found(self, look, *more, now=None):
        """What one part of a check finds: [(status, line)]."""
        found = tarsnapd.Checked(now or self.now)
        look(found, self.server, *more)
        self.figured = {name: number for name, _, number in found.figures}
        return found.faults

    def wrong(self, status, says, *found, **more):
        (found_status, line), = self.found(*found, **more)
        self.assertEqual(found_status, status, line)
        self.assertIn(says, line)

    def test_days_that_are_not_billed(self):
        look, day = tarsnapd.check_bill, tarsnapd.DAY
        self.wrong(WARNING, 'never run', look)
        midnight = self.now // day * day
        self.server.run(tarsnapd.start_make(midnight // day))
        for hours, status in ((30, OK), (31, WARNING), (54, WARNING),
                              (55, CRITICAL)):
            with self.subTest(hours):
                now = midnight + hours * 3600
                if status == OK:
                    self.assertEqual(self.found(look, now=now), [])
                else:
                    self.wrong(status, time.strftime(
                        '%Y-%m-%d is not billed', time.gmtime(midnight)),
                        look, now=now)
        with mock.patch.object(tarsnapd.Server, 'perform_here', (
                lambda server, wish, own=tarsnapd.Server.perform_here:
                midnight + day + 700 if wish == ('now',)
                else own(server, wish))):
            self.server.run(tarsnapd.bill(self.server.prices))
        self.assertEqual(self.found(look, now=midnight + 54 * 3600), [])
        self.assertEqual(self.figured['billed_timestamp_seconds'],
                         midnight + day)

    def test_mail_that_waits(self):
        look = tarsnapd.check_mail
        self.assertEqual(self.found(look), [])
        self.server.run(tarsnapd.mail_put(
            'receipt', 'zoe@example.net', '1', dict.fromkeys(
                ('amount', 'balance', 'date', 'reference'), 'x')))
        self.assertEqual(self.found(look, now=self.now + 7000), [])
        self.wrong(WARNING, '1 wait', look, now=self.now + 7300)
        self.wrong(CRITICAL, 'no attempt was made', look,
                   now=self.now + 86500)
        self.assertEqual(self.figured['mail_due'], 1)

    def test_a_disk_that_is_full(self):
        look = tarsnapd.check_disk
        self.assertEqual(self.found(look, 1), [])
        free = self.figured['disk_free_bytes']
        self.wrong(WARNING, 'bytes are free', look, free * 2 // 3)
        self.wrong(CRITICAL, 'bytes are free', look, free * 2)

    def test_cleaning_and_scrubbing_that_came_to_a_stop(self):
        look, lock = tarsnapd.check_backlog, os.path.join(
            self.path, 'clean.lock')
        self.assertEqual(self.found(look), [])
        open(lock, 'w').close()
        self.assertEqual(self.found(look), [])
        os.utime(lock, (1, self.now - 4 * 86400))
        self.wrong(WARNING, 'nothing was cleaned since', look)
        os.unlink(lock)
        scrub = tarsnapd.Scrub({'finished': self.now - 5 * 86400, 'damage': [
            ['seg/1', 1, 'bytes', 'it is torn']]})
        with mock.patch.object(tarsnapd, 'scrub_saved', lambda path: scrub):
            faults = self.found(look)
        self.assertEqual([status for status, _ in faults],
                         [CRITICAL, WARNING])
        self.assertIn('1 objects are damaged', faults[0][1])
        self.assertIn('last round of scrubbing', faults[1][1])

    def test_a_store_that_is_away(self):
        self.start()
        here('check', self.path, '--server', self.address)
        self.serve.stop()
        os.rename(os.path.join(self.path, 'store'),
                  os.path.join(self.path, 'away'))
        status, out, _ = here('check', self.path, '--server', self.address)
        lines = out.splitlines()
        self.assertEqual(status, CRITICAL)
        self.assertIn('CRITICAL - store: ', lines[0])
        self.assertIn('Connection refused', lines[1])

    def test_each_fault_is_a_line_the_worst_first(self):
        self.start()
        status, out, _ = here('check', self.path, '--server', self.address,
                              '--disk', '1')
        self.assertEqual((status, out.count('\n')), (WARNING, 1), out)
        self.assertIn('WARNING - bill: "tarsnapd bill" was never run|time=',
                      out)
        self.serve.stop()
        status, out, _ = here('check', self.path, '--server', self.address,
                              '--disk', '1')
        self.assertEqual(status, CRITICAL)
        self.assertEqual([line.split()[1] for line in out.splitlines()],
                         ['CRITICAL', 'WARNING'])

    def test_figures_for_prometheus(self):
        self.start()
        file = os.path.join(self.path, 'x"y.prom')
        here('check', self.path, '--server', self.address, '--prometheus',
             file)
        self.assertEqual(stat.S_IMODE(os.stat(file).st_mode) & 0o44, 0o44)
        with open(file) as lines:
            lines = lines.read().splitlines()
        declared = {line.split()[2] for line in lines if line[:6] == '# TYPE'}
        samples = [re.fullmatch(r'(tarsnapd_\w+)(\{(?:\w+="[^"\n]*",?)+\})? '
                                r'([0-9.e+]+)', line)
                   for line in lines if line[0] != '#']
        self.assertNotIn(None, samples)
        self.assertEqual({one.group(1) for one in samples}, declared)
        values = {one.group(1) + (one.group(2) or ''): float(one.group(3))
                  for one in samples}
        self.assertEqual(values['tarsnapd_check_status{part="door"}'], OK)
        self.assertEqual(values['tarsnapd_check_status{part="bill"}'],
                         WARNING)
        self.assertEqual(values['tarsnapd_damaged_objects'], 0)
        self.assertIn('tarsnapd_check_step_seconds{step="write"}', values)
        self.assertGreater(values[
            'tarsnapd_certificate_expiry_timestamp_seconds{where="%s"}'
            % self.address], self.now + 10 ** 9)

    def test_a_certificate_that_ends(self):
        for days, says in ((20, None), (10, (WARNING, 'ends on')),
                           (1, (CRITICAL, 'ends on')),
                           (-1, (CRITICAL, 'ended on'))):
            found = tarsnapd.Checked(self.now)
            tarsnapd.check_certificate(found, 'certificate', 'x',
                                       self.now + days * 86400)
            self.assertEqual([(status, says and says[1]) for status, line
                              in found.faults if says and says[1] in line],
                             [says] if says else [])


class Address(Case):

    def test_a_port_that_was_free(self):
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'w') as file:
            file.write('[server]\nlisten = 127.0.0.1:0\n')
        self.told(here('check', self.path, '--disk', '1'), UNKNOWN,
                  'was not started yet')
        self.start()
        self.told(here('check', self.path, '--disk', '1'), OK,
                  self.address + ': wrote')


class Web(unittest.TestCase):
    """Account pages, over TLS and not."""

    def setUp(self):
        import http.server
        self.status = 200

        class Handler(http.server.BaseHTTPRequestHandler):

            def log_message(self, *words):
                pass

            def do_GET(handler):
                handler.send_response(self.status)
                handler.end_headers()

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0),
                                                      Handler)
        self.port = self.server.server_port
        thread = threading.Thread(target=self.server.serve_forever,
                                  kwargs={'poll_interval': 0.02})
        thread.start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(self.server.shutdown)

    def found(self, url):
        found = tarsnapd.Checked(int(time.time()))
        with found.part('web'):
            tarsnapd.check_web(found, url, 10)
        self.figures = found.figures
        return found.status(), ' '.join(line for _, line in found.faults)

    def test_pages(self):
        url = 'http://127.0.0.1:%d/account.cgi?x=1' % self.port
        self.assertEqual(self.found(url), (OK, ''))
        self.status = 500
        self.assertEqual(self.found(url)[0], CRITICAL)
        self.assertIn('status 500', self.found(url)[1])
        for url, status, says in (
                ('http://127.0.0.1:9/', CRITICAL, 'refused'),
                ('ftp://127.0.0.1/', UNKNOWN, 'is not a URL'),
                ('x', UNKNOWN, 'is not a URL')):
            self.assertEqual(self.found(url)[0], status)
            self.assertIn(says, self.found(url)[1])

    def test_a_certificate_is_verified_and_looked_at(self):
        import ssl
        import s3peers
        where = tempfile.mkdtemp(prefix='web-')
        self.addCleanup(shutil.rmtree, where)
        ca = os.path.join(where, 'cert.pem')
        s3peers.certificate(ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(ca)
        self.server.socket = context.wrap_socket(self.server.socket,
                                                 server_side=True)
        url = 'https://localhost:%d/' % self.port
        self.assertEqual(self.found(url)[0], CRITICAL)
        self.assertIn('verify failed', self.found(url)[1])
        with mock.patch.dict(os.environ, SSL_CERT_FILE=ca):
            self.assertEqual(self.found(url), (OK, ''))
            (name, labels, number), = self.figures
            self.assertEqual(labels, {'where': url})
            with mock.patch.object(tarsnapd.time, 'time',
                                   lambda: number - 5 * 86400):
                self.assertEqual(self.found(url)[0], WARNING)


class Key(Case):

    def test_it_opens_nothing_else(self):
        """Its keys are those of a machine of its own, and cannot nuke."""
        self.start()
        self.check(OK)
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        host = Host(client)
        client.auth(host.machine, host.keys, R, W, D)
        host.backup(client, 'one')
        with open(self.key) as file:
            values = json.load(file)
        values['machine'] = '%016x' % host.machine
        stolen = os.path.join(self.path, 'stolen')
        with open(stolen, 'w') as file:
            json.dump(values, file)
        self.check(CRITICAL, '--key', stolen, says='not the machine\'s key')
        self.assertEqual(set(values), set(tarsnapd.CANARY_FIELDS))


if __name__ == '__main__':
    unittest.main()
