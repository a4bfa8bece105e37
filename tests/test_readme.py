# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The commands of README.md's "Run it for others" do what it says, in turn.

They are taken from the text and run by sh; only places are changed, and the
clock of tarsnapd, so that a day is over when cron comes.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import unittest

import rawclient
import tarsnapd

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Runs a program whose clock, for the server's code, is as many seconds ahead
# as the file says.
SHIFTED = '''
import sys
sys.path.insert(0, %(root)r)
import tarsnapd
perform = tarsnapd.Server.perform_here
def ahead(server, wish):
    value = perform(server, wish)
    if wish == ('now',):
        with open(%(clock)r) as file:
            value += int(file.read())
    return value
tarsnapd.Server.perform_here = ahead
sys.exit(tarsnapd.main(sys.argv[1:]))
'''


def commands(title):
    """What stands indented below a heading: text for sh, one for each
    command, with what follows it on lines of its own.
    """
    with open(os.path.join(ROOT, 'README.md')) as file:
        text = file.read()
    part = re.search(r'(?ms)^## %s\n(.*?)^## ' % title, text)[1]
    lines = [line[4:] for line in part.splitlines() if line[:4] == '    ']
    while lines:
        command = [lines.pop(0)]
        end = re.search(r'<<(\w+)$', command[0])
        while command[-1].endswith('\\') or end and command[-1] != end[1]:
            command.append(lines.pop(0))
        yield '\n'.join(command)


class RunItForOthers(unittest.TestCase):

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.base = base.name
        self.serve = None
        for name in ('bin', 'srv', 'root', 'home', 'var/cache'):
            os.makedirs(os.path.join(self.base, name))
        with open(os.path.join(self.base, 'home', 'letter'), 'wb') as file:
            file.write(os.urandom(200000))
        self.clock(0)
        self.program('tarsnap', os.path.join(ROOT, 'tarsnap.py'))
        self.program('tarsnap-keygen', os.path.join(ROOT, 'keygen.py'),
                     'keygen')
        self.program('tarsnapd', '-c', SHIFTED % {
            'root': ROOT, 'clock': os.path.join(self.base, 'clock')})

    def clock(self, seconds):
        with open(os.path.join(self.base, 'clock'), 'w') as file:
            file.write('%d' % seconds)

    def program(self, name, *words):
        path = os.path.join(self.base, 'bin', name)
        with open(path, 'w') as file:
            file.write('#!/bin/sh\nexec %s "$@"\n' % ' '.join(
                shlex.quote(word) for word in (sys.executable,) + words))
        os.chmod(path, 0o755)

    def here(self, command):
        """The command with places of this test for those in the text."""
        for place in ('/srv/', '/root/', '/var/cache/', '/home'):
            command = re.sub(r'(?<![\w/])%s' % place,
                             self.base + place, command)
        if self.serve:
            command = command.replace('backup.example.org:9279',
                                      '127.0.0.1:%d' % self.serve.port)
            command = command.replace('5f0c...', self.fingerprint)
        return command.replace('\nEND', '\nmail-sendmail = /bin/false\nEND')

    def run_one(self, command):
        """What it prints."""
        cron = re.match(r'(?:[\d*/,-]+ ){5} *', command)
        if cron:                        # another day begins
            command = command[cron.end():]
            self.clock(tarsnapd.DAY + 2 * tarsnapd.BILL_LATER)
            self.addCleanup(self.clock, 0)
        done = subprocess.run(
            ['sh', '-ec', self.here(command)], input=b'secret\n',
            cwd=self.base, capture_output=True, timeout=120,
            env=dict(os.environ, HOME=self.base, PATH='%s:%s' % (
                os.path.join(self.base, 'bin'), os.environ['PATH'])))
        self.assertEqual(done.returncode, 0, (command, done.stderr))
        return done.stdout.decode()

    def test_each_command_in_turn(self):
        out = {}
        found = list(commands('Run it for others'))
        # Cron comes when there is something to charge.
        cron, = [i for i, text in enumerate(found) if text[0].isdigit()]
        found.insert(-5, found.pop(cron))
        for command in found:
            if command.startswith('tarsnapd serve '):
                self.serve = rawclient.Serve(
                    os.path.join(self.base, 'srv/tarsnap'))
                self.addCleanup(self.serve.stop)
                continue
            text = self.run_one(command)
            if command.startswith('tarsnapd init'):
                self.fingerprint = text.strip()
            out[' '.join(command.split()[:4])] = text
        self.serves(out)

    def serves(self, out):
        """It is what the text says."""
        server = 'tarsnapd %s /srv/tarsnap'
        paid = tarsnapd.money_text(25 * tarsnapd.ATTO)
        self.assertIn('balance ' + paid, out[server % 'pay' + ' add'])
        self.assertIn('standing ok', out[server % 'user' + ' show'])
        self.assertRegex(out['tarsnap --keyfile /root/tarsnap.key --usage'],
                         r'(?m)^Balance +\$25\.000000$')
        self.assertIn('receipt ann@example.org',
                      out[server % 'mail' + ' --list'])
        self.assertIn('  ann@example.org\n', out[server % 'report'])
        self.assertIn('RECTYPE,DATE', out[server % 'report' + ' --account'])
        self.assertRegex(out[server % 'pay' + ' refund'], r'balance 14\.99')
        self.assertIn('as in the logs', out[server % 'bill' + ' --check'])


if __name__ == '__main__':
    unittest.main()
